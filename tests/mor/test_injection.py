import copy

import pytest
import torch
from torch import nn

import mor
from mor import MoRConfig, MoRLinear, disabled, eject, inject, trainable_parameters
from mor.injection import mor_layers


def train_a_little(model: nn.Module) -> None:
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)


def snapshot(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Every module and parameter by identity, and what is trainable."""
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return modules | parameters


def test_in_place_and_the_same_at_first(vit, images):
    before = vit(images)
    assert inject(vit, targets=["qkv", "fc"]) is vit
    assert torch.equal(vit(images), before)
    names = [f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    assert list(mor_layers(vit)) == names


def test_only_the_adapters_are_trainable(vit):
    inject(vit, targets="fc")
    assert all(".mor_" in name for name in trainable_parameters(vit))
    assert len(trainable_parameters(vit)) == 6 * 4
    assert not any(p.requires_grad for p in vit.head.parameters())


def test_config_and_fields(vit):
    config = MoRConfig(ranks=(4,), bypass=False)
    inject(vit, "fc", config, dropout=0.1)
    assert all(layer.config == MoRConfig(ranks=(4,), bypass=False, dropout=0.1) for layer in mor_layers(vit).values())


def test_eject_gives_back_the_same_model(vit, images):
    vit.pos_embed.requires_grad_(False)
    before, output = snapshot(vit), vit(images)
    inject(vit, targets=["qkv", "proj", "fc"])
    train_a_little(vit)
    assert not torch.allclose(vit(images), output)
    assert eject(vit) is vit
    assert snapshot(vit) == before
    assert torch.equal(vit(images), output)


def test_eject_needs_an_injected_model(vit):
    with pytest.raises(ValueError, match="has no Mixture-of-Ranks layers; call mor.inject"):
        eject(vit)


def test_twice_is_refused(vit):
    inject(vit, targets="fc")
    before = snapshot(vit)
    with pytest.raises(ValueError, match="already"):
        inject(vit, targets="qkv")
    assert snapshot(vit) == before
    inject(eject(vit), targets="qkv")


def test_disabled_undoes_itself(vit, images):
    base = vit(images)
    inject(vit, targets="fc")
    train_a_little(vit)
    adapted = vit(images)
    with disabled(vit):
        assert torch.equal(vit(images), base)
        with disabled(vit):
            pass
        assert torch.equal(vit(images), base)
    assert torch.equal(vit(images), adapted)
    with pytest.raises(RuntimeError, match="from inside"), disabled(vit):
        raise RuntimeError("from inside")
    assert torch.equal(vit(images), adapted)


def test_new_layers_follow_the_mode(vit):
    assert not inject(vit, targets="fc").blocks[0].mlp.fc1.training
    assert inject(eject(vit).train(), targets="fc").blocks[0].mlp.fc1.training


def test_all_or_nothing(vit):
    vit.blocks[2].mlp.fc2.register_forward_hook(lambda *_: None)
    before = snapshot(vit)
    with pytest.raises(ValueError, match="base must have no forward hooks"):
        inject(vit, targets="fc")
    assert snapshot(vit) == before


def test_a_layer_in_two_places_is_adapted_in_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared})
    inject(model, targets="*")
    assert isinstance(model["one"], MoRLinear) and model["one"] is model["two"]
    eject(model)
    assert model["one"] is model["two"] is shared


def test_fields_on_top_of_a_config(vit):
    inject(vit, "fc1", MoRConfig(dropout=0.1), ranks=(4,), bypass=False)
    assert vit.blocks[0].mlp.fc1.config == MoRConfig(ranks=(4,), bypass=False, dropout=0.1)


def test_a_linear_layer_has_no_place_to_be_replaced_in():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="there is no nn.Linear at all"):
        inject(layer, "*")
    assert layer.weight.requires_grad


def test_deepcopy_is_independent(vit, images):
    inject(vit, targets="fc")
    twin = copy.deepcopy(vit)
    train_a_little(twin)
    assert not torch.allclose(twin(images), vit(images))
    assert not mor_layers(eject(twin)) and mor_layers(vit)


def test_meta_device():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = inject(timm.create_model("vit_base_patch16_224", num_classes=0), targets="fc")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 1_474_656),
        ({"bypass": False}, 1_428_552),
        ({"ranks": (4, 4, 4), "bypass": False}, 1_244_232),
        ({"ranks": (4,), "bypass": False}, 368_640),
    ],
)
def test_parameter_counts_of_the_paper(fields, count):
    """arXiv 2603.17514, Table 7: these plus heads of 4, 5 and 3 classes round to 1,478K, 1,432K, 1,247K and 372K."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = inject(timm.create_model("vit_base_patch16_clip_224", num_classes=0), targets="fc", **fields)
    assert sum(parameter.numel() for parameter in trainable_parameters(model).values()) == count


def test_training_changes_only_the_adapters(vit, images):
    inject(vit, targets=["qkv", "fc"]).train()
    before = {name: p.clone() for name, p in vit.named_parameters()}
    optimizer = torch.optim.AdamW(trainable_parameters(vit).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        vit(images).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in vit.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainable_parameters(vit))


def test_bad_arguments(vit):
    before = snapshot(vit)
    with pytest.raises(ValueError, match="targets must name at least one"):
        inject(vit, targets=[])
    with pytest.raises(TypeError, match="targets must be strings"):
        inject(vit, targets=[3])
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        inject("vit", targets="fc")
    with pytest.raises(TypeError, match="rank"):
        inject(vit, targets="fc", rank=4)
    with pytest.raises(ValueError, match="nothing is left"):
        inject(vit, targets="fc", exclude="fc")
    assert snapshot(vit) == before


def test_public_names():
    functions = {"mor_linear", "inject", "eject", "disabled", "trainable_parameters", "record_gates", "save", "load"}
    functions |= {"preview", "check", "to_lora", "register_with_peft"}
    assert set(mor.__all__) == functions | {"MoRConfig", "MoRLinear"}
