"""Methods that peft has already."""

import sys

import pytest
import torch
from torch import nn

import mor
from ei.config import ModelConfig
from ei.models.backbone import adapted, load_backbone
from ei.models.vit import Backbone

peft = pytest.importorskip("peft")


def shapes(backbone: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in mor.trainable_parameters(backbone).items()}


def test_ia3_scales_what_fc2_reads_and_what_others_give(trunk: Backbone) -> None:
    backbone = adapted(trunk, ModelConfig(adapter="peft:ia3", targets=("qkv", "fc2")))
    per_block = {"attn.qkv.ia3_l.default": (192, 1), "mlp.fc2.ia3_l.default": (1, 256)}
    expected = {f"vit.blocks.{block}.{name}": shape for block in range(4) for name, shape in per_block.items()}
    assert shapes(backbone) == expected


def test_ln_tuning_finds_norms_by_their_whole_names(trunk: Backbone) -> None:
    """'norm' as the end of a name would mean the identities in timm's attentions, too, and peft stops there."""
    assert len(shapes(adapted(trunk, ModelConfig(adapter="peft:ln_tuning")))) == 2 * 9


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("peft:ia4", "adapter must name a method of peft after 'peft:', got 'ia4'; near it are ia3"),
        ("peft:adalora", "adapter 'peft:adalora' cannot be used here: AdaLoRA does not work when `total_step` is None"),
        ("peft:prefix_tuning", "adapter 'peft:prefix_tuning' cannot be used here: "),
        pytest.param(
            *("peft:vera", "adapter 'peft:vera' cannot be used here: .* shared state"),
            marks=pytest.mark.skipif(
                not hasattr(peft.tuners.tuners_utils.BaseTuner, "uses_shared_state"),
                reason="peft before 0.21 makes VeRA layer by layer",
            ),
        ),
        ("peft:poly", "adapter 'peft:poly' cannot be used here: task_ids should not be None$"),
        ("peft:trainable_tokens", "adapter 'peft:trainable_tokens' would train nothing of the ViT"),
    ],
)
def test_methods_that_cannot_be_used(trunk: Backbone, adapter: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        adapted(trunk, ModelConfig(adapter=adapter))
    assert "\n" not in str(refused.value)


def test_methods_that_need_the_values_of_weights_are_refused_in_planning() -> None:
    settings = ModelConfig(backbone="tiny", adapter="peft:shira")
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="used here: it is made from the values of the weights"),
    ):
        adapted(load_backbone(settings, 8), settings)


def test_every_method_of_peft_works_or_is_refused_at_once(trunk: Backbone) -> None:
    """None passes and fails in the first step of training."""
    images, used = torch.randn(2, 3, 8, 8), []
    for kind in peft.PeftType:
        try:
            backbone = adapted(trunk, ModelConfig(adapter=f"peft:{kind.value.lower()}"))
        except ValueError as refused:
            assert "\n" not in str(refused)
            continue
        backbone(images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in mor.trainable_parameters(backbone).values()), kind
        used.append(kind.value.lower())
    assert {"lora", "ia3", "ln_tuning", "loha", "lokr", "oft", "randlora"} <= set(used)
    assert not {"poly", "trainable_tokens", "prefix_tuning"} & set(used)


def test_a_method_that_needs_another_input_is_refused(trunk: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called."""
    from peft.tuners.lora.layer import Linear

    monkeypatch.setattr(Linear, "forward", lambda self, x, task_ids: x)
    with pytest.raises(ValueError, match="adapter 'peft:lora' cannot be used here: .* missing 1 required .*'task_ids'"):
        adapted(trunk, ModelConfig(adapter="peft:lora"))


def test_a_method_that_changes_frozen_weights_is_refused_and_they_are_kept(
    trunk: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject = peft.inject_adapter_in_model

    def meddle(config: object, model: nn.Module) -> nn.Module:
        inject(config, model)
        model.blocks[2].mlp.fc1.base_layer.weight.data += 1
        return model

    monkeypatch.setattr(peft, "inject_adapter_in_model", meddle)
    before = trunk.vit.blocks[2].mlp.fc1.weight.clone()
    with pytest.raises(ValueError, match="adapter 'peft:lora' changes the frozen weights themselves"):
        adapted(trunk, ModelConfig(adapter="peft:lora"))
    assert torch.equal(trunk.vit.blocks[2].mlp.fc1.weight, before)


def test_a_method_that_trains_nothing_is_refused(trunk: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "inject_adapter_in_model", lambda config, model: model)
    with pytest.raises(ValueError, match="adapter 'peft:lora' would train nothing of the ViT"):
        adapted(trunk, ModelConfig(adapter="peft:lora"))


def test_peft_is_asked_for_only_when_it_is_needed(trunk: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    adapted(trunk, ModelConfig(adapter="bitfit"))
    with pytest.raises(ImportError, match=r"adapter 'peft:ia3' needs 'peft', .*: pip install 'mixture-of-ranks\[ei,"):
        adapted(trunk, ModelConfig(adapter="peft:ia3"))
