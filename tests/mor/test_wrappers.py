import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mor import check, disabled, eject, inject, load, preview, record_gates, save
from mor.wrappers import original


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # with which torch 2.11 loads its compiler
def test_compiled_models_are_unwrapped():
    model = nn.Linear(2, 2)
    assert original(model) is model
    assert original(torch.compile(model)) is model


def test_only_modules_have_adapters():
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        original("model")


@pytest.fixture
def peft_model(vit) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(vit, peft.LoraConfig(target_modules=["qkv"]))


@pytest.mark.parametrize("inside", [False, True], ids=["peft's model", "the model inside"])
def test_no_second_kind_of_adapters(peft_model, vit, inside, tmp_path):
    save(inject(copy.deepcopy(peft_model).unload(), "fc"), tmp_path)
    model = peft_model.base_model.model if inside else peft_model
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for call in (lambda: inject(model, "fc"), lambda: preview(model, "fc"), lambda: load(model, tmp_path)):
        with pytest.raises(ValueError, match=r"this is a peft model; use peft.get_peft_model.* unload\(\) before"):
            call()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_what_to_use_with_peft(peft_model, images, tmp_path):
    for call, instead in (
        (lambda: check(peft_model, images), r"mor.peft_plugin.check\(peft_model, example\)"),
        (lambda: save(peft_model, tmp_path), "save_pretrained"),
        (lambda: eject(peft_model), r"unload\(\)"),
        (lambda: disabled(peft_model).__enter__(), r"model.disable_adapter\(\)"),
        (lambda: record_gates(peft_model).__enter__(), r"mor.peft_plugin.as_injected\(peft_model\)"),
    ):
        with pytest.raises(ValueError, match=f"this is a peft model; use .*{instead}"):
            call()


class Sharded(torch.Tensor):
    """What tells the parameters of fully_shard."""

    def full_tensor(self):
        return self


@pytest.mark.parametrize("by", ["DistributedDataParallel", "fully_shard", "fully_shard, which has run"])
def test_what_processes_share_already_gets_no_adapters(vit, by, tmp_path):
    """They would not average the gradients of new parameters."""
    save(inject(copy.deepcopy(vit), "qkv"), tmp_path)
    if by == "fully_shard":
        model = vit
        vit.head.weight = nn.Parameter(vit.head.weight.detach().as_subclass(Sharded))
    elif by == "fully_shard, which has run":  # the outermost module's parameters stay whole until backward
        model = vit
        vit.__class__ = type("Shared", (FSDPModule, type(vit)), {})
    else:
        model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
        nn.Module.__init__(model)
        model.module = vit
    named = by.split(",")[0]
    with pytest.raises(ValueError, match=f"given to {named}.* give adapters to the plain model first"):
        inject(model, "qkv")
    if named == "fully_shard":
        with pytest.raises(ValueError, match="given to fully_shard"):
            load(model, tmp_path)
        peft = pytest.importorskip("peft")
        from mor.peft_plugin import MorConfig

        with pytest.raises(ValueError, match="given to fully_shard"):
            peft.get_peft_model(model, MorConfig(target_modules=["qkv"]))
    assert all(parameter.requires_grad for parameter in vit.parameters())
