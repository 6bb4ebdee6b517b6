"""Backbones from open_clip against open_clip's own forward pass, on a CLIP model of width 32."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ei.config import ModelConfig
from ei.models.backbone import adapted, load_backbone, require_weights
from ei.models.vit_timm import TimmBackbone
from mor import trainable_parameters

open_clip = pytest.importorskip("open_clip")

from ei.models.vit_open_clip import OpenClipBackbone  # noqa: E402

NATIVE = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
TEXT = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make open_clip know a small model under the name 'small'."""

    def add(**vision: object) -> None:
        path = tmp_path / "small.json"
        path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}))
        open_clip.add_model_config(path)

    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    return add


def random_small() -> ModelConfig:
    return ModelConfig(backbone="open_clip:small", pretrained=False)


@pytest.mark.parametrize("changes", [{}, {"patch_dropout": 0.5}, {"no_ln_pre": True}, {"ls_init_value": 0.1}])
def test_equals_the_native_tower_without_tokens(register, changes: dict) -> None:
    register(**NATIVE, **changes)
    backbone = load_backbone(random_small(), 32)
    assert isinstance(backbone, OpenClipBackbone)
    assert (backbone.width, backbone.depth, backbone.patch_size) == (32, 3, 8)
    images = torch.randn(2, 3, 32, 32)
    # Without its projection the tower returns the class token after its final norm.
    assert torch.equal(backbone.train()(images), backbone.vit(images))


def test_tokens_reach_the_class_token_and_adapters_learn(register) -> None:
    register(**NATIVE)
    backbone = adapted(load_backbone(random_small(), 32), ModelConfig())
    images, tokens = torch.randn(2, 3, 32, 32), torch.randn(2, 1, 32, requires_grad=True)
    summary = backbone(images, tokens)
    assert (summary - backbone(images)).abs().max() > 1e-3
    summary[:, 0].sum().backward()
    trained = {name: parameter for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert tokens.grad is not None and tokens.grad.abs().max() > 1e-4
    assert len(trained) == 3 * 2 * 4 and all("mor_" in name for name in trained)


@pytest.mark.parametrize("side", [32, 64, 30])
def test_a_clip_checkpoint_gives_its_vision_tower(register, tmp_path: Path, side: int) -> None:
    register(**NATIVE)
    clip = open_clip.create_model("small")
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    config = ModelConfig(backbone="open_clip:small", weights=str(tmp_path / "clip.safetensors"))
    require_weights(config, side)
    backbone = load_backbone(config, side)

    grown = -(-side // 8) * 8
    expected = open_clip.create_model("small", pretrained=str(tmp_path / "clip.safetensors"), force_image_size=grown)
    expected.visual.proj = None
    images = torch.randn(2, 3, side, side)
    padded = torch.zeros(2, 3, grown, grown)
    padded[:, :, :side, :side] = images
    torch.testing.assert_close(backbone(images), expected.visual(padded), rtol=1e-5, atol=1e-5)


def test_published_weights_equal_the_same_weights_from_a_file(
    register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(**NATIVE)
    clip, path = open_clip.create_model("small"), str(tmp_path / "clip.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, path)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", {"cats": {"hf_hub": "somewhere/"}})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: path)
    from_hub = load_backbone(ModelConfig(backbone="open_clip:small:cats"), 60)
    from_file = load_backbone(ModelConfig(backbone="open_clip:small", weights=path), 60)
    images = torch.randn(1, 3, 60, 60)
    torch.testing.assert_close(from_hub(images), from_file(images), rtol=1e-5, atol=1e-5)


def test_a_timm_trunk_is_a_timm_backbone(register) -> None:
    register(image_size=224, timm_model_name="vit_tiny_patch16_224", timm_pool="token", timm_proj="linear")
    backbone = load_backbone(random_small(), 30)
    assert isinstance(backbone, TimmBackbone)
    assert backbone.vit.pos_embed.shape == (1, 1 + 2 * 2, 192)
    assert backbone(torch.zeros(1, 3, 30, 30)).shape == (1, 192)
    assert not [name for name in backbone.state_dict() if "head" in name]


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (NATIVE | {"attentional_pool": True}, "attention pooling"),
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}, "ModifiedResNet"),
        ({"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "avg"}, "ConvNeXt"),
        ({"image_size": 256, "timm_model_name": "test_vit2", "timm_pool": "avg"}, "no class token"),
    ],
)
def test_other_towers_are_refused(register, vision: dict, message: str) -> None:
    register(**vision)
    with pytest.raises(ValueError, match=f"backbone must be a ViT with a class token.*'open_clip:small'.*{message}"):
        load_backbone(random_small(), 32)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("open_clip:ViT-B-33", False, "near it are ViT-B-32"),
        ("open_clip:ViT-B-32", True, r"published weights \(openai, .*\), got none; or pass --weights FILE"),
        ("open_clip:ViT-B-32:nope", False, "got 'nope'"),
    ],
)
def test_names_and_tags(name: str, pretrained: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(ModelConfig(backbone=name, pretrained=pretrained), 32)
    with pytest.raises(ValueError, match=message):
        require_weights(ModelConfig(backbone=name, pretrained=pretrained), 32)


@pytest.mark.parametrize(("tag", "quick_gelu"), [("openai", True), ("laion2b_e16", False)])
def test_published_weights_are_asked_for_with_their_activation(
    register, monkeypatch: pytest.MonkeyPatch, tag: str, quick_gelu: bool
) -> None:
    asked: dict = {}

    def unreachable(name: str, **options: object) -> None:
        asked.update(options)
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", unreachable)
    name = f"open_clip:ViT-B-32:{tag}"
    with pytest.raises(ValueError, match=f"of '{name}' .no route to host.; pass --weights FILE or --no-pretrained$"):
        load_backbone(ModelConfig(backbone=name), 48)
    assert asked["pretrained"] == tag and asked["force_image_size"] == 64
    assert asked["force_quick_gelu"] is quick_gelu


@pytest.mark.parametrize(
    "adapter",
    [
        {"adapter": "bitfit"},
        {"adapter": "vpt"},
        {"adapter": "losa", "fusion": "late"},
        {"adapter": "latelora"},
        {"adapter": "peft:lora", "targets": ("qkv", "proj", "fc")},
        {"adapter": "peft:ln_tuning"},
    ],
    ids=lambda given: given["adapter"],
)
def test_adapters_are_alive(register, adapter: dict) -> None:
    """Its attention keeps projections as bare parameters, and would read the weight of an adapted one."""
    if adapter["adapter"].startswith("peft:"):
        pytest.importorskip("peft")
    register(**NATIVE)
    trunk = load_backbone(random_small(), 32)
    backbone = adapted(trunk, ModelConfig(**adapter))
    images, tokens = torch.randn(2, 3, 32, 32), torch.randn(2, 2, 32)
    given = (images,) if adapter["adapter"] == "losa" else (images, tokens, torch.tensor([[True, False]] * 2))
    if adapter["adapter"] != "vpt":
        torch.testing.assert_close(backbone(*given), trunk(*given))
    with torch.no_grad():
        for parameter in trainable_parameters(backbone).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    backbone(*given).square().sum().backward()
    assert all(parameter.grad.any() for parameter in trainable_parameters(backbone).values())
