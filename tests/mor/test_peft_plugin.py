import copy
import io
import json
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")

from peft import PeftConfig, PeftModel, PeftType, get_peft_model  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402

import mor  # noqa: E402
from mor import mor_linear  # noqa: E402
from mor.peft_plugin import MorConfig, MorLinear, MorModel, as_injected, check  # noqa: E402


class MLP(nn.Module):
    """peft's own tests look at a method on one like this."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.lin1(self.lin0(x).relu()).relu())


def seeded(build):
    torch.manual_seed(1)
    return build().eval()


VIT = partial(
    timm.models.VisionTransformer, img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
)
SWIN = partial(
    timm.models.SwinTransformer,
    img_size=32,
    patch_size=4,
    window_size=4,
    embed_dim=16,
    depths=(1, 2),
    num_heads=(1, 2),
    num_classes=5,
)
CASES = {
    "MLP": (MLP, (4, 6), {"target_modules": ["lin0", "lin1"]}),
    "MLP, one expert": (MLP, (4, 6), {"target_modules": "lin.*", "ranks": [3], "bypass": False}),
    "ViT": (VIT, (4, 3, 16, 16), {"target_modules": ["qkv", "fc"], "alphas": [1, 2, 4]}),
    "Swin": (SWIN, (4, 3, 32, 32), {"target_modules": ["qkv", "proj", "fc"], "ranks": [1, 2]}),
}


class Case:
    def __init__(self, name: str) -> None:
        build, shape, self.fields = CASES[name]
        self.build = partial(seeded, build)
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(2))

    def config(self, **fields) -> MorConfig:
        return MorConfig(**self.fields, **fields)

    def wrapped(self, **fields) -> PeftModel:
        return get_peft_model(self.build(), self.config(**fields)).eval()

    def trained(self, **fields) -> PeftModel:
        return randomised(self.wrapped(**fields))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mor_" in name}


def snapshot(model: nn.Module) -> dict[str, object]:
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules | {name: (*one, two.sum().item()) for name, (*one, two) in parameters.items()}


# What is written once


def test_the_same_numbers_as_an_injected_model(case):
    fields = {key: value for key, value in case.fields.items() if key != "target_modules"}
    names = [name.removeprefix("base_model.model.") for name in layers_of(case.wrapped())]
    for dropout in (0.0, 0.25):
        wrapped = case.trained(dropout=dropout).train()
        injected = mor.inject(case.build(), names, dropout=dropout, **fields).train()
        copy_adapters(wrapped, injected)
        outputs = []
        for model in (wrapped, injected):
            torch.manual_seed(3)
            outputs.append(model(case.x))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        for name, layer in layers_of(injected, mor.MoRLinear).items():
            twin = wrapped.base_model.model.get_submodule(name)
            for ours, theirs in zip(parameters_of(twin), layer.adapter_parameters().values(), strict=True):
                assert torch.equal(ours.grad, theirs.grad)


def layers_of(model: nn.Module, kind: type = MorLinear) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def parameters_of(layer: MorLinear, name: str = "default") -> list[nn.Parameter]:
    router = [layer.mor_router[name].weight, layer.mor_router[name].bias] if name in layer.mor_router else []
    return [layer.mor_A[name], layer.mor_B[name], *router]


def copy_adapters(wrapped: nn.Module, injected: nn.Module) -> None:
    for name, layer in layers_of(injected, mor.MoRLinear).items():
        twin = wrapped.base_model.model.get_submodule(name)
        with torch.no_grad():
            for source, target in zip(parameters_of(twin), layer.adapter_parameters().values(), strict=True):
                target.copy_(source)


def test_dropout_is_for_training():
    case = Case("MLP")
    model = case.trained(dropout=0.5)
    assert torch.equal(model(case.x), case.trained()(case.x))
    assert not torch.allclose(model.train()(case.x), model(case.x), atol=1e-3)


def test_a_new_adapter_is_drawn_as_an_injected_one():
    wrapped = Case("ViT").wrapped()
    torch.manual_seed(1)
    injected = mor.inject(VIT().eval(), ["qkv", "fc"], alphas=[1, 2, 4])
    assert all(
        torch.equal(wrapped.base_model.model.get_submodule(name).mor_A["default"], layer.mor_A)
        for name, layer in layers_of(injected, mor.MoRLinear).items()
    )


def test_settings_are_those_of_mor():
    config = MorConfig(target_modules="qkv", ranks=[1, 3], alphas=[2, 3], bypass=False, dropout=0.5)
    assert config.mor == mor.MoRConfig(ranks=(1, 3), alphas=(2, 3), bypass=False, dropout=0.5)
    assert MorConfig().mor == mor.MoRConfig()
    for field, value in {"ranks": [0], "alphas": [1.0], "dropout": 1.0}.items():
        with pytest.raises(ValueError, match=field):
            MorConfig(target_modules="qkv", **{field: value})
    with pytest.raises(TypeError, match="bypass"):
        MorConfig(bypass=1)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"target_modules": [3]}, "target_modules must be a string or a list of strings"),
        ({"target_modules": 3}, "target_modules must be a string or a list of strings, got 3"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a whole number or a list of them, got '1'"),
        ({"layers_to_transform": [0, "1"]}, r"layers_to_transform must be a whole number .*, got \[0, '1'\]"),
        ({"layers_to_transform": True}, "layers_to_transform must be a whole number .*, got True"),
        ({"r": 4}, "unexpected keyword argument 'r'; it has ranks, alphas, bypass, dropout, target_modules, exclude"),
        ({"exclude_modules": [None]}, "exclude_modules must be a string or a list of strings"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
    ],
)
def test_settings_of_the_wrong_kind(fields, error):
    with pytest.raises(TypeError, match=error):
        MorConfig(**fields)


def test_fields_of_a_later_version_are_left_out(tmp_path):
    """peft does so if the error has the words that it looks for."""
    Case("MLP").wrapped().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "invented_later": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'invented_later'."):
        assert isinstance(PeftConfig.from_pretrained(tmp_path), MorConfig)


@pytest.mark.parametrize(
    "use", [get_peft_model, PeftModel, lambda model, config: peft.inject_adapter_in_model(config, model)]
)
def test_the_config_of_mor_is_none_of_peft(use):
    with pytest.raises(TypeError, match=r"peft takes mor.peft_plugin.MorConfig\(.*, got mor.MoRConfig"):
        use(MLP(), mor.MoRConfig())


def test_a_string_is_a_regular_expression():
    with pytest.raises(ValueError, match=r"target_modules must be a regular expression or a list, got '\*fc'"):
        MorConfig(target_modules="*fc")


def test_a_pattern_of_layers_needs_their_numbers():
    with pytest.raises(ValueError, match="layers_to_transform must be given"):
        MorConfig(target_modules="qkv", layers_pattern="blocks")


# What every method of peft does


def test_is_what_peft_expects():
    assert (
        issubclass(MorConfig, PeftConfig) and issubclass(MorLinear, BaseTunerLayer) and issubclass(MorModel, BaseTuner)
    )
    assert MorConfig().peft_type is PeftType.MOR and PeftType("MOR") is PeftType.MOR in list(PeftType)
    assert PeftType.MOR == "MOR" and len(PeftType.__members__) == len(list(PeftType))


def test_starts_as_the_model_it_was(case):
    assert torch.equal(case.wrapped()(case.x), case.build()(case.x))
    assert not torch.allclose(case.wrapped(init_weights=False)(case.x), case.build()(case.x), atol=1e-3)


def test_only_adapters_are_trainable(case):
    model = case.wrapped()
    assert all(("mor_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(tensor.numel() for tensor in adapter_state(model).values()) > 0


def test_training_changes_adapters_alone(case):
    model = case.wrapped().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(case.x).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "mor_" in name}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saves_and_loads_under_other_names(case, tmp_path, low_cpu_mem_usage):
    model = case.trained(modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    expected, state = model(case.x), peft.get_peft_model_state_dict(model)

    def assert_same(loaded: PeftModel, name: str) -> None:
        theirs = peft.get_peft_model_state_dict(loaded, adapter_name=name)
        assert theirs.keys() == state.keys() and all(torch.equal(theirs[key], state[key]) for key in state)
        # Tensors that lie in the mapped file are aligned otherwise, and summed in another order.
        torch.testing.assert_close(loaded(case.x), expected)

    loaded = PeftModel.from_pretrained(case.build(), tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(loaded, "other")
    loaded.load_adapter(tmp_path, "third", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("third")
    loaded.delete_adapter("other")
    assert_same(loaded, "third")
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    loaded.save_pretrained(tmp_path / "again")
    assert_same(PeftModel.from_pretrained(case.build(), tmp_path / "again/third"), "default")


def test_low_memory_means_no_memory():
    model = get_peft_model(MLP(), MorConfig(target_modules="lin0"), low_cpu_mem_usage=True)
    assert {p.device.type for p in parameters_of(layers_of(model)["base_model.model.lin0"])} == {"meta"}


def test_keys_of_the_file(tmp_path):
    from safetensors.torch import load_file

    Case("MLP").wrapped(modules_to_save=["head"]).save_pretrained(tmp_path)
    adapter = ("mor_A", "mor_B", "mor_router.weight", "mor_router.bias")
    names = {f"{layer}.{name}" for layer in ("lin0", "lin1") for name in adapter} | {"head.weight", "head.bias"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.{name}" for name in names}


def test_the_saved_configuration_names_layers_in_full_and_in_order(tmp_path):
    model = get_peft_model(seeded(VIT), MorConfig(target_modules={"fc", "qkv"}, exclude_modules={"fc2"}))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == [f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "mlp.fc1")]
    assert written["exclude_modules"] == [f"blocks.{i}.mlp.fc2" for i in range(3)]
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MorConfig) and loaded.mor == MorConfig().mor
    assert loaded.target_modules == model.peft_config["default"].target_modules


def test_many_layers_keep_their_full_names():
    model = get_peft_model(VIT(depth=6), MorConfig(target_modules=["qkv", "proj", "fc"]))
    assert len(model.peft_config["default"].target_modules) == 24 == len(layers_of(model))


def test_disabled_is_the_base(case):
    model = case.trained()
    adapted, base = model(case.x), case.build()(case.x)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with model.disable_adapter():
        assert torch.equal(model(case.x), base)
    assert torch.equal(model(case.x), adapted) and not torch.allclose(adapted, base, atol=1e-3)
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]


def two_adapters(case: Case) -> PeftModel:
    """ "default" and "other", of different ranks and random, the first active."""
    model = case.trained()
    model.add_adapter("other", MorConfig(target_modules=case.fields["target_modules"], ranks=[5]))
    model.set_adapter("other")
    randomised(model, seed=1)
    model.set_adapter("default")
    return model.eval()


def test_adapters_take_turns(case):
    model = two_adapters(case)
    first = model(case.x)
    assert torch.equal(first, case.trained()(case.x))
    model.set_adapter("other")
    second = model(case.x)
    assert not torch.allclose(first, second, atol=1e-3)
    assert {"other" in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    model.set_adapter("default")
    assert torch.equal(model(case.x), first)


def test_a_further_adapter_changes_nothing_yet(case):
    model = case.trained()
    expected = model(case.x)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_adapter("other", case.config())
    assert torch.equal(model(case.x), expected)
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]


def test_active_adapters_add_up():
    model = two_adapters(Case("MLP"))
    layer, x = layers_of(model)["base_model.model.lin0"], torch.randn(4, 6)
    base, alone = layer.base_layer(x), []
    for name in ("default", "other"):
        layer.set_adapter(name)
        alone.append(layer(x) - base)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), base + alone[0] + alone[1])


def test_adapters_may_sit_in_different_layers():
    case = Case("MLP")
    model = get_peft_model(case.build(), MorConfig(target_modules=["lin0"]))
    model.add_adapter("other", MorConfig(target_modules=["lin1"]))
    model.set_adapter("other")
    randomised(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lin1" not in name] == []
    assert not torch.allclose(model(case.x), case.build()(case.x), atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(model(case.x), case.build()(case.x))


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_deleted_adapters_are_gone(case):
    model = two_adapters(case)
    model.set_adapter("other")
    expected = model(case.x)
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"] and torch.equal(model(case.x), expected)
    assert not [name for name in model.state_dict() if "default" in name]
    model.delete_adapter("other")
    # Without any adapter, PeftModel itself no longer runs, as with peft's own methods.
    assert not adapter_state(model) and torch.equal(model.base_model(case.x), case.build()(case.x))


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_deleting_the_active_one_activates_another(case):
    model = two_adapters(case)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert not torch.allclose(model(case.x), case.build()(case.x), atol=1e-3)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_deletes_where_a_module_has_the_prefix_in_its_name():
    """peft passes over names that contain "mor_", and many of those are tumours."""
    model = nn.ModuleDict({"tumor_encoder": MLP()})
    model.forward = lambda x: model["tumor_encoder"](x)
    model = get_peft_model(model, MorConfig(target_modules=["lin0"], modules_to_save=["head"]))
    model.add_adapter("other", MorConfig(target_modules=["lin0"], modules_to_save=["head"]))
    model.delete_adapter("default")
    assert {name.rpartition(".lin0.")[2] for name in adapter_state(model)} == {
        "mor_A.other", "mor_B.other", "mor_router.other.weight", "mor_router.other.bias"
    }  # fmt: skip
    assert model.active_adapters == ["other"]
    assert model.base_model.model["tumor_encoder"].head.active_adapters == ["other"]


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_changes_nothing(case, merge):
    model = case.trained()
    before, expected = snapshot(model), model(case.x)
    with pytest.raises(NotImplementedError, match=r"mor\.to_lora\(model, batches, directory\)"):
        getattr(model, merge)()
    assert snapshot(model) == before and torch.equal(model(case.x), expected)


def test_a_refused_merge_leaves_what_stands_before_the_adapters():
    model = get_peft_model(MLP(), MorConfig(target_modules=["lin1"], modules_to_save=["lin0"]))
    before = snapshot(model)
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()
    assert snapshot(model) == before


def test_other_roads_to_one_matrix_are_refused():
    model = Case("MLP").trained()
    layer = layers_of(model)["base_model.model.lin0"]
    for call in (layer.merge, partial(layer.get_delta_weight, "default")):
        with pytest.raises(NotImplementedError, match="mor.to_lora"):
            call()
    if hasattr(peft, "convert_to_lora"):
        with pytest.raises(NotImplementedError, match="mor.to_lora"):
            peft.convert_to_lora(model, rank=4)
        assert not model.supports_lora_conversion()
    assert not hasattr(model, "add_weighted_adapter")
    model.unmerge_adapter()


def test_unload_gives_the_model_back(case):
    model = case.build()
    modules = [id(module) for module in model.modules()]
    wrapped = randomised(get_peft_model(model, case.config()))
    assert wrapped.unload() is model
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(model(case.x), case.build()(case.x))


def test_status(case):
    model = two_adapters(case)
    status = peft.get_model_status(model)
    assert status.available_adapters == ["default", "other"] and status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "other": False} and status.merged_adapters == []
    assert status.peft_types == {"default": "MOR", "other": "MOR"} and status.adapter_model_type == "MorModel"
    assert status.num_adapter_layers == len(peft.get_layer_status(model)) == len(layers_of(model))


def test_gradient_checkpointing():
    case = Case("ViT")
    model = case.trained().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(model(case.x).square().sum(), parameters)
    model.base_model.model.set_grad_checkpointing()
    again = torch.autograd.grad(model(case.x).square().sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize(("autocast_adapter_dtype", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_narrow_models(case, autocast_adapter_dtype, dtype):
    model = case.build().bfloat16()
    model = get_peft_model(model, case.config(), autocast_adapter_dtype=autocast_adapter_dtype)
    assert {tensor.dtype for tensor in adapter_state(model).values()} == {dtype}
    y = randomised(model)(case.x.bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    y.sum().backward()


class Narrowing(nn.Linear):
    """As quantised layers do, it answers in a dtype of its own."""

    def forward(self, input):
        return super().forward(input).bfloat16()


@pytest.mark.parametrize(("base", "dtype"), [(nn.Linear, torch.bfloat16), (Narrowing, torch.float32)])
def test_further_active_adapters_keep_the_dtype_of_the_base(base, dtype):
    config = MorConfig(target_modules=["0"])
    model = get_peft_model(nn.Sequential(base(4, 3)).to(dtype), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    layer = randomised(model).base_model.model[0]
    for part in (layer.mor_A, layer.mor_B, layer.mor_router):
        part.float()  # peft 0.18 does so with the first adapter only
    assert len(layer.active_here) == 2
    assert layer(torch.randn(5, 4, dtype=dtype)).dtype == torch.bfloat16


def test_autocast_gives_what_the_model_gave(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.trained()(case.x).dtype == case.build()(case.x).dtype


def test_copies_and_pickles(case):
    model = case.trained()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(case.x), model(case.x))
        nn.init.zeros_(next(p for name, p in twin.named_parameters() if "mor_B" in name))
        assert not torch.equal(twin(case.x), model(case.x))


@pytest.mark.parametrize("name", ["MLP", "ViT"])
def test_compiles_as_one_graph(name):
    case = Case(name)
    model = case.trained().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(case.x).square().sum(), parameters)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.x), model(case.x))
    for one, other in zip(torch.autograd.grad(compiled(case.x).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_mixed_batches(case):
    model = two_adapters(case)
    names = ["other", "__base__", "default", "other"]
    if case.build().__class__.__name__ == "SwinTransformer":
        # Its windows are rows of their own, and a name for each image does not say whose they are.
        with pytest.raises(ValueError, match="one name for each row that reaches a layer, got 4 names for 16 rows"):
            model(case.x, adapter_names=names)
        return
    y = model(case.x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            expected = case.build()(case.x)
        else:
            model.set_adapter(name)
            expected = model(case.x)
        torch.testing.assert_close(y[row], expected[row])
    model.set_adapter("default")
    torch.testing.assert_close(model(case.x), case.trained()(case.x))


def test_mixed_batches_mix_heads_too():
    case = Case("MLP")
    model = case.trained(modules_to_save=["head"])
    expected = torch.stack([model(case.x)[0], case.build()(case.x)[1]])
    torch.testing.assert_close(model(case.x[:2], adapter_names=["default", "__base__"]), expected)


def test_mixed_batches_refuse_what_they_cannot_do():
    case = Case("MLP")
    model = two_adapters(case)
    with pytest.raises(ValueError, match="must be adapters of the model or '__base__', got stranger"):
        model(case.x, adapter_names=["default", "stranger", "other", "other"])
    with pytest.raises(ValueError, match="one name for each row that reaches a layer, got 2 names for 4 rows"):
        model(case.x, adapter_names=["default", "other"])
    with pytest.raises(TypeError, match="adapter_names must be a list with one name for each row, got 'default'"):
        model(case.x, adapter_names="default")
    with pytest.raises(ValueError, match="call model.eval"):
        model.train()(case.x, adapter_names=["default"] * 4)
    # Nothing is left behind by the failures.
    assert torch.equal(model.eval()(case.x), case.trained()(case.x))


def test_without_peft_model(case):
    """What transformers and diffusers use."""
    model = peft.inject_adapter_in_model(case.config(), case.build())
    randomised(model)
    state = peft.get_peft_model_state_dict(model)
    other = peft.inject_adapter_in_model(case.config(), case.build(), adapter_name="other")
    result = peft.set_peft_model_state_dict(other, state, adapter_name="other")
    assert not result.unexpected_keys and torch.equal(other(case.x), model.eval()(case.x))


def test_new_layers_follow_the_mode():
    assert not any(layer.training for layer in layers_of(get_peft_model(seeded(VIT), Case("ViT").config())).values())
    assert all(layer.training for layer in layers_of(get_peft_model(VIT(), Case("ViT").config())).values())


# Bases that are not a plain matrix


class Doubling(nn.Linear):
    """Stands for a quantised layer: its weight is not what it computes with."""

    def forward(self, input):
        return super().forward(input) * 2


class Opaque(nn.Module):
    """Stands for a quantised layer that is no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.qweight = nn.Parameter(torch.randint(9, (6, 4)), requires_grad=False)

    def forward(self, x):
        return x @ self.qweight.to(x.dtype)


@pytest.mark.parametrize("base", [Doubling(6, 4), Opaque()], ids=lambda base: type(base).__name__)
def test_other_linear_layers_are_called(base):
    model = randomised(get_peft_model(nn.Sequential(base), MorConfig(target_modules=["0"])))
    layer, x = model.base_model.model[0], torch.randn(3, 6, requires_grad=True)
    zero = torch.zeros(4, 6)
    tensors = [parameter.detach() for parameter in parameters_of(layer)]
    expected = base(x) + mor_linear(x, zero, None, *tensors, ranks=(2, 4, 8), scaling=(2.0,) * 3)
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in parameters_of(layer))


def test_hooks_of_the_base_still_run():
    model = Case("MLP").trained()
    layer, x, seen = layers_of(model)["base_model.model.lin0"], torch.randn(2, 6), []
    expected = layer(x)
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), expected)
    assert seen == [1]


# Which layers


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "qkv"}, ["0.attn.qkv", "1.attn.qkv", "2.attn.qkv"]),
        ({"target_modules": ["attn.qkv"]}, ["0.attn.qkv", "1.attn.qkv", "2.attn.qkv"]),
        # The role; as the end of a name it would mean the patch embedding, too.
        ({"target_modules": ["proj"]}, ["0.attn.proj", "1.attn.proj", "2.attn.proj"]),
        ({"target_modules": r"blocks\.[01]\.mlp\.fc\d"}, ["0.mlp.fc1", "0.mlp.fc2", "1.mlp.fc1", "1.mlp.fc2"]),
        ({"target_modules": ["blocks.1.mlp.fc1", "qkv"], "layers_to_transform": 0}, ["0.attn.qkv", "1.mlp.fc1"]),
        ({"target_modules": ["fc1"], "layers_to_transform": [0, -1]}, ["0.mlp.fc1", "2.mlp.fc1"]),
        (
            {"target_modules": ["fc1", "attn.qkv"], "layers_to_transform": [1], "layers_pattern": "blocks"},
            ["1.attn.qkv", "1.mlp.fc1"],
        ),
        ({"target_modules": "fc", "exclude_modules": ["fc2", "blocks.0.mlp.fc1"]}, ["1.mlp.fc1", "2.mlp.fc1"]),
        ({"target_modules": "fc", "exclude_modules": r".*\.[12]\..*"}, ["0.mlp.fc1", "0.mlp.fc2"]),
        (
            {"target_modules": "all-linear", "exclude_modules": "fc", "layers_to_transform": None},
            [f"{i}.attn.{name}" for i in range(3) for name in ("qkv", "proj")],
        ),
        ({"target_modules": ["qkv"], "modules_to_save": ["head", "blocks.1"]}, ["0.attn.qkv", "2.attn.qkv"]),
    ],
    ids=str,
)
def test_targets(fields, expected):
    model = get_peft_model(seeded(VIT), MorConfig(**fields))
    assert [name.removeprefix("base_model.model.blocks.") for name in layers_of(model)] == expected
    assert model.peft_config["default"].target_modules == tuple(f"blocks.{name}" for name in expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layers_to_transform": [0, 2]}, ["layers.0.blocks.0", "layers.1.blocks.1"]),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, ["layers.0.blocks.0", "layers.1.blocks.0"]),
    ],
    ids=["counted", "by name"],
)
def test_blocks_are_counted_or_told_by_their_names(fields, expected):
    model = get_peft_model(seeded(SWIN), MorConfig(target_modules="qkv", **fields))
    assert model.peft_config["default"].target_modules == tuple(f"{name}.attn.qkv" for name in expected)


def test_a_full_name_is_no_end_of_a_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert list(layers_of(get_peft_model(model, MorConfig(target_modules=["0"])))) == ["base_model.model.0"]


def test_a_later_adapter_finds_what_the_first_one_wrapped():
    model = get_peft_model(seeded(VIT), MorConfig(target_modules="qkv", modules_to_save=["head"]))
    before = {name: id(module) for name, module in model.named_modules()}
    model.add_adapter("other", MorConfig(target_modules=["qkv", "fc1"]))
    model.add_adapter("third", MorConfig(target_modules="all-linear"))
    counts = {name: sum(name in layer.mor_A for layer in layers_of(model).values()) for name in model.peft_config}
    assert counts == {"default": 3, "other": 6, "third": 12}
    assert all(id(model.get_submodule(name)) == one for name, one in before.items() if "qkv" in name or "head" in name)


def test_gates_of_a_wrapped_model():
    case = Case("ViT")
    model = case.trained(modules_to_save=["head"])
    expected = model(case.x)
    with as_injected(model) as (inside, saved), mor.record_gates(inside) as record:
        assert torch.equal(inside(case.x), expected) and saved == ["head.*"]
    assert len(record.summary()) == 9 and torch.equal(model(case.x), expected)
    model.add_adapter("other", case.config())
    model.base_model.set_adapter(["default", "other"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="one adapter must be active and enabled, got default, other"):
        as_injected(model).__enter__()
    assert snapshot(model) == before


class ReadingAttention(nn.Module):
    """Stands for a host that nobody knows, and that reads a weight instead of calling its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(nn.functional.linear(x, self.qkv.weight, self.qkv.bias))


def test_check_finds_dead_adapters():
    model = get_peft_model(ReadingAttention(), MorConfig(target_modules=["qkv", "fc"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="not called in training: qkv; not called in evaluation: qkv;"):
        check(model, torch.randn(3, 6))
    assert snapshot(model) == before
    model.add_adapter("other", MorConfig(target_modules=["fc"]))
    model.set_adapter("other")
    check(model, torch.randn(3, 6))


def test_check_leaves_a_live_model_as_it_was(case):
    model = case.trained(modules_to_save=["head"]).train()
    before, state = snapshot(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check(model, case.x)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_check_needs_adapters():
    with pytest.raises(ValueError, match="must have Mixture-of-Ranks layers, but has none; use get_peft_model first"):
        check(MLP(), torch.randn(4, 6))


def test_shared_layers_are_adapted_wherever_they_are():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"again": shared})["again"])
    wrapped = randomised(get_peft_model(model, MorConfig(target_modules=["0"])))
    assert isinstance(model[0], MorLinear) and model[0] is model[2]
    wrapped.unload()
    assert model[0] is model[2] is shared


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in  -:UserWarning")  # peft before 0.21
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    build = partial(seeded, partial(transformers.ViTForImageClassification, settings))
    x = torch.randn(2, 3, 16, 16)
    config = MorConfig(target_modules="all-linear", modules_to_save=["classifier"])
    model = randomised(get_peft_model(build(), config))
    assert len(layers_of(model)) == 12 and torch.is_tensor(model(pixel_values=x).logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, "other")
    assert torch.equal(loaded(pixel_values=x).logits, model.eval()(pixel_values=x).logits)


class AttentionPool2d(nn.Module):
    """Stands for the pool of CLIP's ResNets, which only reads its projections' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.c_proj = nn.Linear(4, 4)


def encoder() -> nn.Module:
    """In evaluation torch hands its weights to a kernel, and calls no layer, unless something is done about it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_hosts_that_read_weights_are_made_to_call_them(tmp_path):
    model, x = seeded(encoder), torch.randn(3, 5, 8)
    with torch.no_grad():
        base = model(x)
    wrapped = get_peft_model(model, MorConfig(target_modules="all-linear")).eval()
    torch.testing.assert_close(wrapped(x), base)
    wrapped.add_adapter("other", MorConfig(target_modules=["in_proj", "linear2"]))
    assert len(layers_of(wrapped)) == 8 and sum("other" in layer.mor_A for layer in layers_of(wrapped).values()) == 4
    for layer in layers_of(wrapped).values():
        nn.init.normal_(layer.mor_B["default"])
        alone = wrapped(x)
        assert not torch.allclose(alone, base, atol=1e-3)
        nn.init.zeros_(layer.mor_B["default"])
    randomised(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(encoder), tmp_path).eval()
    torch.testing.assert_close(loaded(x), wrapped(x))
    assert wrapped.unload() is model
    with torch.no_grad():
        assert torch.equal(model(x), base)
    assert [type(module) for module in model.modules()] == [type(module) for module in encoder().modules()]
    assert model.layers[0].activation_relu_or_gelu


def test_hosts_inside_a_compiled_model_are_put_back():
    model = seeded(encoder)
    wrapped = get_peft_model(torch.compile(model, backend="eager"), MorConfig(target_modules=["linear1"]))
    assert not model.layers[0].activation_relu_or_gelu
    wrapped.unload()
    assert model.layers[0].activation_relu_or_gelu


REFUSED = {
    "missing": (MLP, {}, "target_modules must say what to adapt"),
    "empty": (MLP, {"target_modules": []}, "target_modules must say what to adapt"),
    "misspelt": (
        MLP,
        {"target_modules": ["lin0", "lin7"]},
        "^target_modules 'lin7' matches no nn.Linear; .*names are lin0",
    ),
    "no match": (VIT, {"target_modules": r"block\..*"}, "matches no nn.Linear"),
    "a convolution": (VIT, {"target_modules": ["patch_embed.proj"]}, r"linear layers only, but match patch_embed.proj"),
    "a container": (VIT, {"target_modules": r"blocks\.0\.mlp.*"}, r"blocks.0.mlp \(Mlp\)"),
    "dead by name": (AttentionPool2d, {"target_modules": ["c_proj"]}, "c_proj: the attention pool"),
    "dead by expression": (AttentionPool2d, {"target_modules": "c_.*"}, "c_proj: the attention pool"),
    "dead by all-linear": (AttentionPool2d, {"target_modules": "all-linear"}, "c_proj: the attention pool"),
    "dead at last": (
        lambda: nn.ModuleList([encoder(), AttentionPool2d()]),
        {"target_modules": ["in_proj", "linear1", "c_proj"]},
        "1.c_proj: the attention pool",
    ),
    "head": (MLP, {"target_modules": "lin0", "modules_to_save": ["haed"]}, "modules_to_save 'haed' matches no module"),
    "exclusion": (
        MLP,
        {"target_modules": "lin0", "exclude_modules": ["lin7"]},
        "^exclude_modules 'lin7' matches no nn.Linear; .*names are lin0",
    ),
    "all excluded": (MLP, {"target_modules": "lin0", "exclude_modules": "lin.*"}, "must leave a layer"),
    "layers": (
        VIT,
        {"target_modules": ["attn.qkv"], "layers_to_transform": [7], "layers_pattern": "blocks"},
        r"'attn.qkv' matches nothing in layers_to_transform \[7\] by layers_pattern 'blocks'$",
    ),
    "layers, counted": (
        VIT,
        {"target_modules": ["attn.qkv"], "layers_to_transform": [7]},
        r"'attn.qkv' matches nothing in layers_to_transform \[7\]$",
    ),
    "layers of a role": (
        VIT,
        {"target_modules": ["fc"], "layers_to_transform": [7]},
        r"^layers_to_transform must be blocks of the model, which has 3, got \[7\]$",
    ),
    "injected": (lambda: mor.inject(VIT(), "fc"), {"target_modules": "qkv"}, "has Mixture-of-Ranks layers already"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_touched(what):
    build, fields, message = REFUSED[what]
    model = build()
    before, config = snapshot(model), MorConfig(**fields)
    given = config.target_modules
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert snapshot(model) == before and not hasattr(model, "peft_config")
    assert config.target_modules == given


def test_layers_without_weights_are_refused_before_anything_is_touched():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    before = list(model.modules())
    with pytest.raises(ValueError, match="but 1 do not know their size yet; call the model once before"):
        get_peft_model(model, MorConfig(target_modules=["0", "1"]))
    assert list(model.modules()) == before and model[0].weight.requires_grad
    model(torch.randn(2, 4))
    assert len(layers_of(get_peft_model(model, MorConfig(target_modules=["0", "1"])))) == 2


def beit() -> nn.Module:
    return timm.models.Beit(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


@pytest.mark.parametrize("name", ["a.b", "keys", "training", "forward"])
def test_names_that_no_adapter_can_have(name):
    model = beit()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^adapter_name must not be empty, have a dot.* got '{name}'"):
        get_peft_model(model, MorConfig(target_modules=["qkv"]), adapter_name=name)
    assert snapshot(model) == before and not model.blocks[0].attn.qkv_bias_separate
    assert not hasattr(model, "_mor_host_changes")


def failing_at_second(monkeypatch) -> None:
    update_layer, calls = MorLinear.update_layer, []

    def failing(self, *args):
        update_layer(self, *args)
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError("at the second layer")

    monkeypatch.setattr(MorLinear, "update_layer", failing)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model, config = seeded(beit), MorConfig(target_modules=["qkv"])
    before, x = snapshot(model), torch.randn(2, 3, 16, 16)
    expected = model(x)
    failing_at_second(monkeypatch)
    with pytest.raises(MemoryError):
        get_peft_model(model, config)
    assert snapshot(model) == before and not model.blocks[0].attn.qkv_bias_separate
    assert not getattr(model, "_mor_host_changes", ()) and torch.equal(model(x), expected)
    assert len(layers_of(get_peft_model(model, config))) == 2 and model.blocks[0].attn.qkv_bias_separate


def test_a_failure_at_the_end_leaves_parameters_trainable(monkeypatch):
    def failing(self, model):
        model.requires_grad_(False)
        raise MemoryError("after freezing")

    model = beit()
    before = snapshot(model)
    monkeypatch.setattr(MorModel, "_mark_only_adapters_as_trainable", failing)
    with pytest.raises(MemoryError, match="after freezing"):
        get_peft_model(model, MorConfig(target_modules=["qkv"]))
    assert snapshot(model) == before


def test_a_further_adapter_that_fails_in_the_middle_leaves_the_first(monkeypatch):
    model = randomised(get_peft_model(seeded(beit), MorConfig(target_modules=["fc1"]))).eval()
    before, x = snapshot(model), torch.randn(2, 3, 16, 16)
    expected = model(x)
    failing_at_second(monkeypatch)
    with pytest.raises(MemoryError):
        model.add_adapter("other", MorConfig(target_modules=["fc1", "qkv"]))
    assert snapshot(model) == before and list(model.peft_config) == ["default"]
    assert not model.base_model.model.blocks[0].attn.qkv_bias_separate and torch.equal(model(x), expected)
    model.add_adapter("other", MorConfig(target_modules=["fc1", "qkv"]))
    assert sum("other" in layer.mor_A for layer in layers_of(model).values()) == 4


@pytest.mark.parametrize("inject", [get_peft_model, peft.inject_adapter_in_model])
def test_settings_can_be_used_for_another_model(inject):
    config = MorConfig(target_modules=["qkv"], exclude_modules=["blocks.0.attn.qkv"])
    given = copy.deepcopy(vars(config))
    for depth in (2, 4):
        arguments = (VIT(depth=depth), config)
        model = inject(*(arguments if inject is get_peft_model else reversed(arguments)))
        names = [f"blocks.{i}.attn.qkv" for i in range(1, depth)]
        assert [name.partition("blocks")[2] for name in layers_of(model)] == [n.removeprefix("blocks") for n in names]
        assert model.peft_config["default"].target_modules == tuple(names)
        assert {name: getattr(config, name) for name in ("target_modules", "exclude_modules")} == {
            name: given[name] for name in ("target_modules", "exclude_modules")
        }


def test_a_refused_further_adapter_leaves_the_first(case):
    model = case.trained()
    before, expected = snapshot(model), model(case.x)
    with pytest.raises(ValueError, match="matches no nn.Linear"):
        model.add_adapter("other", MorConfig(target_modules=[*case.fields["target_modules"], "lin7"]))
    assert snapshot(model) == before and list(model.peft_config) == ["default"]
    assert torch.equal(model(case.x), expected)


# What a reader of the folder is told


def test_the_model_card_says_what_to_import(tmp_path):
    model = Case("MLP").trained()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and card.count("import mor.peft_plugin") == 1
    assert card.index("import mor.peft_plugin") < card.index("# Model Card")
    model.load_adapter(tmp_path, "other")
    model.save_pretrained(tmp_path)
    assert "import mor.peft_plugin" in (tmp_path / "other/README.md").read_text()


def test_without_the_import_peft_cannot_and_with_the_cards_lines_it_can(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 3)), MorConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    lines = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL).group(1)
    code = f"""
from torch import nn
from peft import PeftModel
model = nn.Sequential(nn.Linear(6, 3))
try:
    PeftModel.from_pretrained(model, {str(tmp_path)!r})
except KeyError as error:
    print("KeyError", error)
{lines.replace("path/to/this/folder", str(tmp_path))}
print(sorted(model.peft_config))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["KeyError 'MOR'", "['default']"], done.stderr


# Registration


def test_registering_twice_does_no_harm():
    before = list(PeftType)
    mor.register_with_peft()
    mor.register_with_peft()
    assert list(PeftType) == before and type(Case("MLP").wrapped().base_model) is MorModel


@pytest.mark.parametrize(("version", "reason"), [("0.17.1", "this is peft 0.17.1"), (None, "import of peft halted")])
def test_peft_must_be_there_and_new_enough(monkeypatch, version, reason):
    monkeypatch.delitem(sys.modules, "mor.peft_plugin")
    if version is None:
        monkeypatch.setitem(sys.modules, "peft", None)
    else:
        monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=f"needs peft 0.18 or newer .{reason}"):
        mor.register_with_peft()
