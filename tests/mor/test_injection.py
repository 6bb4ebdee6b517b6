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
    with pytest.raises(ValueError, match=r"cannot be adapted: blocks.2.mlp.fc2; remove the hooks .* exclude"):
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
    with pytest.raises(ValueError, match="the model itself is a linear layer, .*; wrap it in a module"):
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
    for keywords in ({"rank": 4}, {"r": 8, "alpha": 16}):
        with pytest.raises(TypeError, match=r"unknown keyword \w+=\d.*; .* are ranks, alphas, bypass, dropout"):
            inject(vit, targets="fc", **keywords)
    for config in ({}, {"ranks": (4,)}, (2, 4), MoRConfig):
        with pytest.raises(TypeError, match=r"config must be a mor.MoRConfig, or be left out .*, got "):
            inject(vit, "fc", config)
    for call in ({"targets": None}, {"targets": 3}, {"targets": "fc", "exclude": None}):
        with pytest.raises(TypeError, match=f"{list(call)[-1]} must be strings, got"):
            inject(vit, **call)
    with pytest.raises(ValueError, match="backend must be one of"):
        inject(vit, "fc", backend="fast")
    with pytest.raises(ValueError, match="nothing is left"):
        inject(vit, targets="fc", exclude="fc")
    assert snapshot(vit) == before


def test_a_config_of_peft_is_named():
    plugin = pytest.importorskip("mor.peft_plugin")
    with pytest.raises(TypeError, match=r"got MorConfig, whose .mor is one"):
        inject(nn.Sequential(nn.Linear(4, 4)), "*", plugin.MorConfig(target_modules=["0"]))


def test_the_backend_is_that_of_every_layer(vit):
    inject(vit, "fc", backend="eager")
    assert {layer.backend for layer in mor_layers(vit).values()} == {"eager"}


def test_an_interrupted_example_leaves_the_model_as_it_was(vit, images):
    def interrupt(*_):
        raise KeyboardInterrupt

    vit.head.register_forward_hook(interrupt)
    before = snapshot(vit)
    with pytest.raises(KeyboardInterrupt):
        inject(vit, "fc", example=images)
    assert snapshot(vit) == before and not hasattr(vit, "_mor_injection")


def test_a_model_made_in_inference_mode_is_left_as_it_was():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"made outside of torch.inference_mode"):
        inject(model, "*", example=torch.randn(2, 4))
    assert snapshot(model) == before and not hasattr(model, "_mor_injection")
    assert snapshot(eject(inject(model, "*"))) == before


def test_a_compiled_model_is_the_one_inside(vit, images):
    compiled = torch.compile(vit, backend="eager")
    before = compiled(images)
    assert inject(compiled, "fc", example=images) is compiled
    train_a_little(compiled)
    assert "blocks.0.mlp.fc1.mor_A" in trainable_parameters(compiled)
    assert torch.allclose(compiled(images), vit(images), atol=1e-6) and not torch.allclose(compiled(images), before)
    with disabled(compiled):
        assert torch.equal(vit(images), before)
    assert eject(compiled) is compiled and not mor_layers(vit) and not hasattr(vit, "_mor_injection")


def test_disabled_needs_adapters(vit):
    with pytest.raises(ValueError, match="no Mixture-of-Ranks layers to disable; call mor.inject"), disabled(vit):
        pass
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"), disabled("vit"):
        pass


def test_public_names():
    functions = {"mor_linear", "inject", "eject", "disabled", "trainable_parameters", "record_gates", "save", "load"}
    functions |= {"preview", "check", "to_lora", "register_with_peft"}
    assert set(mor.__all__) == functions | {"MoRConfig", "MoRLinear"}


class Closed(nn.Sequential):
    """Takes no new attribute."""

    def __setattr__(self, name, value):
        if name == "_mor_injection":
            raise AttributeError("this model is closed")
        super().__setattr__(name, value)


def test_a_failure_at_the_very_end_leaves_the_model_as_it_was():
    model = Closed(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    modules, flags = list(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(AttributeError, match="closed"):
        inject(model, "*")
    assert [one is other for one, other in zip(model, modules, strict=True)] == [True] * 3
    assert [p.requires_grad for p in model.parameters()] == flags


def test_ctrl_c_while_layers_are_made_leaves_the_model_as_it_was(vit, monkeypatch):
    import mor.injection as injection

    made = []

    def interrupted(*args, **kwargs):
        made.append(True)
        if len(made) == 3:
            raise KeyboardInterrupt
        return MoRLinear(*args, **kwargs)

    monkeypatch.setattr(injection, "MoRLinear", interrupted)
    before = {name: (id(module), module.training) for name, module in vit.named_modules()}
    with pytest.raises(KeyboardInterrupt):
        inject(vit, "qkv")
    assert {name: (id(module), module.training) for name, module in vit.named_modules()} == before
    assert all(p.requires_grad for p in vit.parameters())
    assert not hasattr(vit, "_mor_injection")
