"""Injected models under what torch and its users do to models: sharing, copying, checkpointing, exporting, sharding."""

import copy
import importlib
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from mor import check, eject, inject, load, preview, save, trainable_parameters
from mor.injection import mor_layers

HERE = Path(__file__).parent


def perturb(model: nn.Module) -> None:
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    output = model(x)
    output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    output.pow(2).sum().backward()
    return [parameter.grad.clone() for parameter in trainable_parameters(model).values()]


def assert_close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert one
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def open_clip_tower() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(1)
    return open_clip.transformer.VisionTransformer(16, 8, 32, 2, 2, 2.0, output_dim=8).eval()


def beit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("beit_base_patch16_224", num_classes=3, **sizes).eval()


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def test_an_attention_in_two_places():
    """One adapter, alive in both."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = x + self.one(x, x, x)[0]
            return x + self.two(x, x, x)[0]

    model, x = Twice().eval(), torch.randn(2, 3, 8)
    with torch.no_grad():
        output = model(x)
        inject(model, ["*.in_proj", "*.out_proj"], example=x)
        assert list(mor_layers(model)) == ["one.out_proj", "one.in_proj"] and model.one is model.two
        torch.testing.assert_close(model(x), output)
        perturb(model)
        assert not torch.allclose(model(x), output)
        assert torch.equal(eject(model)(x), output) and model.one is model.two
    assert type(model.one) is nn.MultiheadAttention


def test_excluding_only_one_of_two_names_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared, "three": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="one and two are the same layer, so either both can be adapted or none"):
        inject(model, "*", exclude="two")
    assert not mor_layers(model) and shared.weight.requires_grad
    inject(model, "*", exclude=["one", "two"])
    assert list(mor_layers(model)) == ["three"]


def test_tied_weights(tmp_path):
    """Two layers with one weight: an adapter each, and the weight stays shared."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model

    model, x = build(), torch.randn(3, 6)
    output = model(x)
    inject(model, ["0", "2"], example=x)
    assert torch.equal(model(x), output) and model[0].weight is model[2].weight
    perturb(model)
    save(model, tmp_path)
    assert torch.equal(load(build(), tmp_path)(x), model(x))
    eject(model)
    assert torch.equal(model(x), output) and model[0].weight is model[2].weight and model[0].weight.requires_grad


class Quantised(nn.Linear):
    """int8 rows with a scale each, which only its own forward understands."""

    @classmethod
    def of(cls, base: nn.Linear) -> "Quantised":
        self = cls(base.in_features, base.out_features)
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        return self

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_quantised_layers_in_a_model(vit, images, tmp_path):
    for block in vit.blocks:
        block.mlp.fc1 = Quantised.of(block.mlp.fc1)
    plain, output = copy.deepcopy(vit), vit(images)
    inject(vit, "all", example=images)
    assert torch.equal(vit(images), output)
    perturb(vit)
    save(vit, tmp_path)
    assert torch.equal(load(plain, tmp_path)(images), vit(images))
    assert torch.equal(eject(vit)(images), output)


def test_models_without_weights():
    """On the meta device all can be planned and undone; weights come later."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("beit_large_patch16_224", num_classes=0)
    shown = preview(model, "all")
    inject(model, "all")
    assert shown.parameters == sum(p.numel() for p in trainable_parameters(model).values())
    assert all(block.attn.qkv_bias_separate for block in model.blocks)
    eject(model)
    assert not any(block.attn.qkv_bias_separate for block in model.blocks)


@pytest.mark.parametrize("build", [beit, open_clip_tower])
def test_checkpointing_gives_the_same_gradients(build, images):
    model = inject(build().train(), "all")
    perturb(model)
    expected = gradients(model, images)
    model.set_grad_checkpointing(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # open_clip's text of torch's choice between two kinds
        assert_close(gradients(model, images), expected)
        check(model, images)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointing_of_transformers(images):
    model = inject(hf_vit().train(), "all")
    perturb(model)
    expected = gradients(model, images)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients(model, images), expected)
    check(model, images)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_checkpointing_that_loses_gradients_is_seen(images):
    """The older kind gives none if no input asks for one: the base is frozen, so no input does."""
    model = inject(hf_vit().train(), "fc")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="without a gradient in training: layers.0.mlp.fc1, layers.0.mlp.fc2"):
        check(model, images)
    model.enable_input_require_grads()
    check(model, images)


@pytest.mark.parametrize("build", [beit, open_clip_tower])
def test_pickled_as_a_whole(build, images):
    model = inject(build(), "all")
    perturb(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(images), model(images))
    plain = eject(twin)
    assert not mor_layers(plain) and list(plain.state_dict()) == list(build().state_dict())


@pytest.mark.parametrize(
    "build",
    [
        lambda: pytest.importorskip("timm").models.VisionTransformer(16, 8, embed_dim=32, depth=1, num_heads=2),
        pytest.param(beit, marks=pytest.mark.slow),
        pytest.param(open_clip_tower, marks=pytest.mark.slow),
    ],
    ids=["vit", "beit", "open_clip"],
)
def test_exported(build, images):
    model = inject(build().eval(), "all")
    perturb(model)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images), atol=1e-5, rtol=1e-5)
    assert sum("mor_" in name for name, _ in exported.named_parameters()) == len(trainable_parameters(model))


@pytest.mark.parametrize("backend", ["eager", "concat"])
def test_exported_for_any_number_of_images(vit, images, backend):
    model = inject(vit.eval(), "all", backend=backend)
    perturb(model)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("B")},)).module()
    more = torch.cat([images, -images, images])
    torch.testing.assert_close(exported(more), model(more), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "clip"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one(how, model):
    pytest.importorskip("timm")
    command = [sys.executable, "-W", "ignore", str(HERE / "two_processes.py"), how, model]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0 and "same as one process" in result.stdout, result.stderr[-3000:]


@pytest.fixture
def replicas(monkeypatch):
    """What nn.DataParallel makes of a model for two devices, but for the devices."""

    def copies(tensors, devices, detach=False):
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    functions = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(functions, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(functions, "_get_device_index", lambda device, *_: device)
    return lambda model: functions.replicate(model, [0, 1])


@pytest.mark.parametrize("with_peft", [False, True], ids=["mor", "peft"])
def test_replicas_of_data_parallel_compute_with_their_own_parameters(vit, images, replicas, with_peft):
    if with_peft:
        peft = pytest.importorskip("peft")
        from mor.peft_plugin import MorConfig

        model = peft.get_peft_model(vit, MorConfig(target_modules=["qkv", "fc"]))
    else:
        model = inject(vit, ["qkv", "fc"])
    perturb(model)
    output = model(images)
    first, second = replicas(model)
    (first(images) + second(images)).sum().backward()
    assert all(parameter.grad.any() for parameter in trainable_parameters(model).values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(first(images), output) and torch.equal(second(images), output)


@pytest.mark.parametrize("target", ["self_attn.in_proj", "self_attn.out_proj"])
def test_data_parallel_is_refused_where_replicas_would_share_parameters(replicas, target):
    model = inject(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), target)
    with pytest.raises(ValueError, match="nn.DataParallel cannot copy an attention .* use .*DistributedDataParallel"):
        replicas(model)
    replicas(eject(model))
