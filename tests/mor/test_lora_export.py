import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mor import MoRConfig, MoRLinear, disabled, inject, to_lora, trainable_parameters
from mor.injection import mor_layers

peft = pytest.importorskip("peft")


@pytest.fixture
def trained(vit) -> nn.Module:
    return randomised(inject(copy.deepcopy(vit), targets=["qkv", "fc"], ranks=(1, 2, 4), alphas=(3, 2, 1)))


def randomised(model: nn.Module) -> nn.Module:
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    return model


def with_constant_gates(model: nn.Module) -> nn.Module:
    for layer in mor_layers(model).values():
        nn.init.zeros_(layer.mor_router.weight)
    return model


def plain_lora(model: nn.Module, folder) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, folder).eval()


def test_constant_gates_lose_nothing(trained, vit, images, tmp_path):
    report = to_lora(with_constant_gates(trained), [images], tmp_path)
    assert report.outputs.max < 1e-5 and report.agreement == 1
    assert all(cost.max < 1e-5 and cost.of_update < 1e-5 for cost in report.layers.values())
    loaded = plain_lora(vit, tmp_path)
    torch.testing.assert_close(loaded(images), trained(images), rtol=1e-4, atol=1e-5)


def test_peft_alone_loads_and_merges_it(trained, vit, images, tmp_path):
    report = to_lora(trained, [images], tmp_path)
    loaded = plain_lora(vit, tmp_path)
    layer = loaded.base_model.model.blocks[0].mlp.fc1
    assert type(layer).__module__.startswith("peft.tuners.lora") and layer.scaling == {"default": 1.0}
    assert report.rank == layer.r["default"] == 7
    adapted = loaded(images)
    merged = loaded.merge_and_unload()
    assert type(merged.blocks[0].mlp.fc1) is nn.Linear
    torch.testing.assert_close(merged(images), adapted, rtol=1e-4, atol=1e-5)


def test_the_report_is_the_truth_about_the_files(trained, vit, images, tmp_path):
    """Measured here again, with what peft makes of the folder."""
    report = to_lora(trained, [images[:1], images[1:]], tmp_path)
    inputs, exact = {}, {}

    def remember(name, args, y):
        inputs[name], exact[name] = args[0], y

    for name, layer in mor_layers(trained).items():
        layer.register_forward_hook(lambda layer, args, y, name=name: remember(name, args, y))
    y, loaded = trained(images), plain_lora(copy.deepcopy(vit), tmp_path)
    assert report.outputs.max > 0.01
    errors = relative(loaded(images), y)
    assert report.outputs.overall == pytest.approx(((loaded(images) - y).norm() / y.norm()).item(), rel=1e-3)
    assert report.outputs.max == pytest.approx(errors.max().item(), rel=1e-3)
    assert report.agreement == (loaded(images).argmax(-1) == y.argmax(-1)).float().mean().item()
    for name, cost in report.layers.items():
        frozen = loaded.base_model.model.get_submodule(name)(inputs[name])
        errors = relative(frozen, exact[name])
        overall = (frozen - exact[name]).norm() / exact[name].norm()
        assert cost.overall == pytest.approx(overall.item(), rel=1e-3)
        assert cost.max == pytest.approx(errors.max().item(), rel=1e-3)
        assert cost.count == errors.numel() == 10
        update = exact[name] - mor_layers(trained)[name].base(inputs[name])
        assert cost.of_update == pytest.approx(((frozen - exact[name]).norm() / update.norm()).item(), rel=1e-3)


def relative(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (y - exact).norm(dim=-1) / exact.norm(dim=-1)


def test_gates_are_the_mean_over_all_tokens(tmp_path):
    """Batches of different sizes count by their tokens."""
    model = randomised(inject(nn.Sequential(nn.Linear(4, 3)), "0", ranks=(1, 2), alphas=(1, 4)))
    x = torch.randn(10, 4)
    to_lora(model, [x[:1], x[1:]], tmp_path)
    layer, lora = model[0], plain_lora(nn.Sequential(nn.Linear(4, 3)), tmp_path).base_model.model[0]
    gates = layer.gates(x).mean(0)
    expected = gates[0] * layer.mor_B[:1].T @ layer.mor_A[:1] + 2 * gates[1] * layer.mor_B[1:].T @ layer.mor_A[1:]
    torch.testing.assert_close(lora.get_delta_weight("default"), expected)


def test_the_cost_on_other_data(trained, images, tmp_path):
    calibrated = to_lora(trained, [images[:1]], tmp_path)
    other = to_lora(trained, [images[:1]], tmp_path, held_out=[images[1:]])
    assert other.outputs.overall != calibrated.outputs.overall and other.outputs.count == 1


def test_the_head_goes_along(trained, vit, images, tmp_path):
    trained.head.requires_grad_(True)
    nn.init.normal_(trained.head.weight)
    with pytest.warns(
        UserWarning, match="trainable but not saved: head.bias, head.weight; name them with extra="
    ) as warned:
        to_lora(trained, [images], tmp_path)
    assert [warning.filename for warning in warned] == [__file__]
    to_lora(with_constant_gates(trained), [images], tmp_path, extra="head.*")
    torch.testing.assert_close(plain_lora(vit, tmp_path)(images), trained(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "other"), [("proj", "blocks.0.attn.proj"), ("model", "base_model"), ("ed", "patch_embed")]
)
def test_parts_whose_name_is_the_end_of_another(vit, images, tmp_path, name, other):
    """peft would take the other module for one that was saved, and miss its parameters."""
    vit.add_module(name, nn.Linear(2, 2))
    model = randomised(inject(vit, "fc"))
    with pytest.raises(ValueError, match=f"cannot hold '{name}' alone, because '{other}' ends alike"):
        to_lora(model, [images], tmp_path / "out", extra=f"{name}.*")
    assert not (tmp_path / "out").exists()


def test_names_that_end_alike_may_be_saved_together_or_be_empty(vit, images, tmp_path):
    vit.add_module("neck_head", nn.Linear(2, 2))
    assert any(name.endswith(".norm") for name, _ in vit.named_modules())
    trained = randomised(inject(copy.deepcopy(vit), "fc"))
    nn.init.normal_(trained.head.weight)
    nn.init.normal_(trained.norm.weight)
    to_lora(with_constant_gates(trained), [images], tmp_path, extra=["head.*", "neck_head.*", "norm.*"])
    torch.testing.assert_close(plain_lora(vit, tmp_path)(images), trained(images), rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was(trained, images, tmp_path):
    trained.train()
    trained.blocks[0].eval()
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    modes = [module.training for module in trained.modules()]
    to_lora(trained, [images], tmp_path)
    assert modes == [module.training for module in trained.modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.modules())


def test_dropout_is_off_while_measuring(vit, images, tmp_path):
    model = randomised(inject(vit, "fc", dropout=0.5)).train()
    assert to_lora(with_constant_gates(model), [images], tmp_path).outputs.max < 1e-5


def test_a_model_that_peft_wrapped(vit, images, tmp_path):
    from mor.peft_plugin import MorConfig, MorLinear

    config = MorConfig(target_modules="fc", modules_to_save=["head"])
    model = peft.get_peft_model(copy.deepcopy(vit), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    model.add_adapter("other", MorConfig(target_modules="qkv"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MorLinear) and "default" in module.mor_A:
                module.mor_router["default"].weight.zero_()
    before = {name: id(module) for name, module in model.named_modules()}
    expected = model(images)
    report = to_lora(model, [images], tmp_path)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert report.outputs.max < 1e-5 and len(report.layers) == 6
    torch.testing.assert_close(plain_lora(vit, tmp_path)(images), expected, rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default"])
    with model.disable_adapter(), pytest.raises(ValueError, match="one adapter must be active and enabled"):
        to_lora(model, [images], tmp_path)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_layers_of_different_ranks_and_ambiguous_names(tmp_path):
    """ "0" is also the end of "1.0", which has no adapter, and of "2.0", whose rank is another."""
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain = nn.Sequential(nn.Linear(4, 4), pair, nn.Sequential(nn.Linear(4, 4))).requires_grad_(False)
    model = copy.deepcopy(plain)
    model[0] = MoRLinear(model[0], MoRConfig(ranks=(2,), bypass=False))
    model[1][1] = MoRLinear(model[1][1], MoRConfig(ranks=(1, 1)))
    model[2][0] = MoRLinear(model[2][0], MoRConfig(ranks=(3,), bypass=False))
    for layer in mor_layers(model).values():
        nn.init.normal_(layer.mor_B)
    nn.init.zeros_(model[1][1].mor_router.weight)
    x = torch.randn(6, 4)
    report = to_lora(model, [x], tmp_path)
    loaded = plain_lora(plain, tmp_path)
    assert report.rank == 3 and type(loaded.base_model.model[1][0]) is nn.Linear
    torch.testing.assert_close(loaded(x), model(x))


def test_plain_lora_is_exact(vit, images, tmp_path):
    """A single expert without bypass has no router to freeze."""
    model = randomised(inject(copy.deepcopy(vit), "fc", ranks=(4,), bypass=False, alphas=(2,)))
    assert to_lora(model, [images], tmp_path).outputs.max < 1e-5
    torch.testing.assert_close(plain_lora(vit, tmp_path)(images), model(images), rtol=1e-4, atol=1e-5)


class Answering(nn.Module):
    """Models answer in many ways."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.lin, self.answer = nn.Linear(4, 3), answer

    def forward(self, x, scale=1.0):
        return self.answer(self.lin(x) * scale)


@dataclass
class InFields:
    out: torch.Tensor


class Logits:
    def __init__(self, logits) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: y,
        lambda y: (None, y),
        lambda y: {"name": "x", "out": y},
        lambda y: (None, [{"positions": torch.arange(5)}, (y,)]),
        InFields,
        Logits,
        lambda y: y[:, 0],
        lambda y: y.sum(),
    ],
)
@pytest.mark.parametrize("batch", ["tensor", "tuple", "mapping"])
def test_batches_and_answers_of_all_kinds(tmp_path, answer, batch):
    x = torch.randn(5, 4)
    model = randomised(inject(Answering(answer), "lin"))
    batch = {"tensor": x, "tuple": (x, 2.0), "mapping": {"x": x, "scale": 3.0}}[batch]
    report = to_lora(model, iter([batch]), tmp_path)
    assert report.layers["lin"].count == 5 and 0 < report.outputs.overall < float("inf")


def test_refused_before_anything_is_written(trained, vit, images, tmp_path):
    with pytest.raises(ValueError, match="must have Mixture-of-Ranks layers, but has none; call mor.inject"):
        to_lora(vit, [images], tmp_path / "out")
    with pytest.raises(ValueError, match="^batches must hold at least one batch, but is empty"):
        to_lora(trained, [], tmp_path / "out")
    with pytest.raises(ValueError, match="^held_out must hold at least one batch, but is empty"):
        to_lora(trained, [images], tmp_path / "out", held_out=[])
    used_up = iter([images])
    with pytest.raises(ValueError, match="^held_out .* is empty .or a generator that is used up."):
        to_lora(trained, used_up, tmp_path / "out", held_out=used_up)
    with pytest.raises(TypeError, match="^batches must be several batches, .* got Tensor"):
        to_lora(trained, images, tmp_path / "out")
    with pytest.raises(TypeError, match="^batches must be several batches, .* got NoneType"):
        to_lora(trained, None, tmp_path / "out")
    with pytest.raises(TypeError, match="^held_out must be several batches, .* got dict"):
        to_lora(trained, [images], tmp_path / "out", held_out={"x": images})
    with disabled(trained), pytest.raises(ValueError, match="must be enabled to be measured; leave mor.disabled first"):
        to_lora(trained, [images], tmp_path / "out")
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="^a batch must be a tensor, .* so without labels .* the model fails: "):
        to_lora(trained, [(images, labels)], tmp_path / "out")
    for held_out in (None, [images]):
        with pytest.raises(
            ValueError, match="^batches must give finite values, but the gates are not finite in blocks"
        ):
            to_lora(trained, [images * torch.nan], tmp_path / "out", held_out=held_out)
    with pytest.raises(ValueError, match="^held_out must give finite values, but the model's outputs are not finite"):
        to_lora(trained, [images], tmp_path / "out", held_out=[images, images * torch.inf])
    with pytest.raises(ValueError, match="extra 'classifier.*' matches nothing"):
        to_lora(trained, [images], tmp_path / "out", extra="classifier.*")
    with pytest.raises(ValueError, match="cannot hold 'pos_embed'"):
        to_lora(trained, [images], tmp_path / "out", extra="pos_embed")
    assert not (tmp_path / "out").exists()


def test_the_report_reads_as_a_table(trained, images, tmp_path):
    report = to_lora(trained, [images], tmp_path)
    lines = str(report).splitlines()
    assert lines[0].split() == ["relative", "error", "overall", "max", "of", "update"]
    assert [line.split()[0] for line in lines[1:-2]] == list(report.layers)
    assert lines[-2].startswith("outputs of the model") and f"{report.outputs.overall:.2%}" in lines[-2]
    assert lines[-1] == f"the largest output is the same for {report.agreement:.2%} of 2"
    assert str(report) in (tmp_path / "README.md").read_text()


def test_the_folder_names_layers_one_by_one(trained, images, tmp_path):
    to_lora(trained, [images], tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == list(mor_layers(trained))
    assert written["r"] == written["lora_alpha"] == 7 and not written["rank_pattern"]


def test_a_layer_that_no_batch_reaches(tmp_path):
    model = inject(nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)}), "*used")
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match="^batches must reach every adapted layer, but none reached unused"):
        to_lora(model, [torch.randn(3, 4)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answer", [lambda y: None, lambda y: y.argmax(-1), lambda y: {"a": [None]}])
def test_models_that_return_nothing_to_measure(tmp_path, answer):
    model = inject(Answering(answer), "lin")
    with pytest.raises(ValueError, match="the model must return floating-point tensors to be measured, got "):
        to_lora(model, [torch.randn(5, 4)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("answer", "vectors", "counts"),
    [
        (lambda y: y[0, 0, 0], 1, True),
        (lambda y: y[:, 0, 0], 2, True),
        (lambda y: y[:, 0], 8, True),
        (lambda y: y[:, 0, :, :1], 8, False),
        # A map of classes, (B, C, H, W): its last dimension is that of no class.
        (lambda y: y, 2, False),
        (lambda y: y.sum(), 1, False),
    ],
)
def test_agreement_is_one_of_classes(tmp_path, answer, vectors, counts):
    model = randomised(inject(Answering(answer), "lin"))
    report = to_lora(model, [torch.randn(2, 3, 4, 4)], tmp_path)
    assert report.outputs.count == vectors and (report.agreement is not None) == counts
    assert ("the largest output" in str(report)) == counts


def test_maps_are_measured_by_image(tmp_path):
    plain, x = Answering(lambda y: y), torch.randn(2, 3, 4, 4)
    model = randomised(inject(copy.deepcopy(plain), "lin"))
    report = to_lora(model, [x], tmp_path)
    errors = relative(plain_lora(plain, tmp_path)(x).flatten(1), model(x).flatten(1))
    assert report.outputs.max == pytest.approx(errors.max().item(), rel=1e-3)


# Hosts that inject had to change


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def swin() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=[2, 2], num_classes=3
    ).eval()


def beit() -> nn.Module:
    models = pytest.importorskip("timm").models
    return models.Beit(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, use_rel_pos_bias=True
    ).eval()


READ_BY_HOSTS = {
    "torchvision Swin": (swin, ["qkv", "proj", "fc"], ("features.*.*.attn.qkv", "features.*.*.attn.proj")),
    "timm BEiT": (beit, ["qkv", "proj", "fc"], ("blocks.*.attn.qkv",)),
    "torch": (encoder, ["proj", "fc"], ("self_attn.out_proj", "linear1", "linear2")),
}


@pytest.mark.parametrize("family", READ_BY_HOSTS)
def test_hosts_that_read_weights_need_merging(family, tmp_path):
    """Until it is merged, peft's LoRA around such a layer does nothing, and everybody is told."""
    build, targets, patterns = READ_BY_HOSTS[family]
    x = torch.randn(2, 5, 8) if family == "torch" else torch.randn(2, 3, 16, 16)
    plain = build()
    model = with_constant_gates(randomised(inject(copy.deepcopy(plain), targets)))
    with pytest.warns(UserWarning, match="works only after merging .merge_and_unload.: the plain model reads"):
        report = to_lora(model, [x], tmp_path)
    ends = tuple(pattern.rpartition(".*.")[2] for pattern in patterns)
    assert report.only_merged == tuple(name for name in mor_layers(model) if name.endswith(ends))
    card = (tmp_path / "README.md").read_text()
    assert "works only after merging" in str(report) and "loads and merges it as any other" not in card
    assert card.count("works only after merging") == 2 and all(end in card for end in ends)
    loaded = plain_lora(plain, tmp_path)
    with torch.no_grad():
        expected = model(x)
        assert (loaded(x) - expected).norm() > 0.05 * expected.norm()
        assert (loaded.merge_and_unload()(x) - expected).norm() < 1e-4 * expected.norm()


def test_hosts_in_a_part_of_the_model_and_under_peft(tmp_path):
    from mor.peft_plugin import MorConfig

    x = torch.randn(2, 5, 8)
    wrapper = nn.Sequential(nn.Identity(), inject(encoder(), "fc1"))
    tuned = peft.inject_adapter_in_model(MorConfig(target_modules=["linear1"]), encoder())
    wrapped = peft.get_peft_model(encoder(), MorConfig(target_modules=["linear1"]))
    for model, prefix in ((wrapper, "1."), (tuned, ""), (wrapped, "")):
        with pytest.warns(UserWarning, match="only after merging"):
            report = to_lora(model, [x], tmp_path)
        assert report.only_merged == tuple(f"{prefix}layers.{i}.linear1" for i in range(2))


def test_hosts_that_call_need_no_merging(trained, images, tmp_path):
    report = to_lora(trained, [images], tmp_path)
    assert report.only_merged == () and "merging" not in str(report)
    assert "peft loads and merges it as any other" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("way", ["inject", "peft"])
def test_borrowed_projections_are_refused(way, tmp_path):
    from mor.peft_plugin import MorConfig

    if way == "inject":
        model = inject(encoder(), ["*.in_proj", "fc"])
    else:
        model = peft.get_peft_model(encoder(), MorConfig(target_modules=["in_proj", "fc"]))
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    message = (
        r"peft has no layer for layers.\*.self_attn.in_proj, whose weights are bare .* leave them out with exclude="
    )
    with pytest.raises(ValueError, match=message):
        to_lora(model, [torch.randn(2, 5, 8)], tmp_path / "out")
    assert not called and not (tmp_path / "out").exists()


# Compiled models


@pytest.mark.parametrize("what", ["afterwards", "before", "a block", "in place"])
def test_compiled_models(vit, images, tmp_path, what):
    plain = copy.deepcopy(vit)
    if what == "before":
        model = compiled = randomised(inject(torch.compile(vit, backend="eager"), ["qkv", "fc"]))
    else:
        model = compiled = randomised(inject(vit, ["qkv", "fc"]))
        if what == "a block":
            model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
        elif what == "in place":
            torch.compiler.reset()
            model.compile(backend="eager")
            with torch.no_grad():  # a graph that knows of no hooks
                model(images)
        else:
            compiled = torch.compile(model, backend="eager")
    modules = [id(module) for module in compiled.modules()]
    report = to_lora(compiled, [images], tmp_path, extra="head.*")
    assert not [name for name in report.layers if "_orig_mod" in name]
    assert modules == [id(module) for module in compiled.modules()]
    loaded = plain_lora(plain, tmp_path)
    with torch.no_grad():
        expected = model(images)
    error = (loaded(images) - expected).norm() / expected.norm()
    assert report.outputs.overall == pytest.approx(error.item(), rel=1e-3)


def test_a_compiled_host_that_needs_merging(tmp_path):
    model = inject(torch.compile(encoder(), backend="eager"), "*.linear1")
    with pytest.warns(UserWarning, match="only after merging"):
        assert len(to_lora(model, [torch.randn(2, 5, 8)], tmp_path).only_merged) == 2


def test_files_of_others_stay(trained, images, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    called = []
    trained.register_forward_hook(lambda *_: called.append(1))
    with pytest.raises(ValueError, match="has files that no adapter was saved with .* overwritten: README.md; choose"):
        to_lora(trained, [images], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"] and not called
    assert (tmp_path / "README.md").read_text() == "# My project\n"
