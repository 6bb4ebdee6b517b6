"""Loading the backbone that a configuration names, and making it learn."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import mor
from ei.config import ADAPTERS, ModelConfig
from ei.models.backbone import adapted, load_backbone, require_weights
from ei.models.vit import Backbone


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def refuse(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        assert not pretrained, f"asked the hub for {name}"
        return create(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", refuse)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "which is a SwinTransformer$"),
        ("convnext_tiny", "which is a ConvNeXt$"),
        ("vit_small_patch16_dinov3", "which is a Eva$"),
        ("vit_base_patch16_siglip_224", "has no class token$"),
        ("vit_small_r26_s32_224", "begins with a HybridEmbed$"),
        ("vit_base_patch16_clip", "near it are .*vit_base_patch16_clip_224"),
        ("vit_base_patch16_clip_224.opena", "not known to timm: Invalid pretrained tag"),
        ("hf-hub:somebody/something", "must be 'tiny', open_clip:NAME or a timm model"),
        ("", "must be 'tiny', open_clip:NAME or a timm model"),
    ],
)
def test_other_models_are_refused_before_any_download(no_download: None, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_backbone(ModelConfig(backbone=name), 32)
    assert str(refused.value).startswith("backbone ") and "\n" not in str(refused.value)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def unreachable(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise OSError("no route to host.\nand a long story")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match="of 'test_vit' .no route to host.; pass --weights FILE or --no-pretrained$"):
        load_backbone(ModelConfig(backbone="test_vit"), 32)


def test_published_weights_equal_the_same_weights_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_vit").state_dict()  # for 160 px, and with a head of 1000 classes
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published))
    save_file(published, tmp_path / "vit.safetensors")
    from_hub = load_backbone(ModelConfig(backbone="test_vit"), 100)
    from_file = load_backbone(ModelConfig(backbone="test_vit", weights=str(tmp_path / "vit.safetensors")), 100)
    images = torch.randn(1, 3, 100, 100)
    assert torch.equal(from_hub(images), from_file(images))


@pytest.mark.parametrize("name", ["tiny", "test_vit"])
@pytest.mark.parametrize("weights", ["", "nowhere.safetensors"])
def test_on_the_meta_device_no_weights_are_read(no_download: None, name: str, weights: str) -> None:
    with torch.device("meta"):
        backbone = load_backbone(ModelConfig(backbone=name, weights=weights), 64)
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}


def test_everything_is_frozen(trunk: Backbone) -> None:
    assert mor.trainable_parameters(trunk) == {}


@pytest.mark.parametrize("side", [160, 96, 100])
def test_weights_of_another_grid_equal_timms_dynamic_size(tmp_path: Path, side: int) -> None:
    vit = timm.create_model("test_vit", dynamic_img_size=True, dynamic_img_pad=True)  # 160 px, patches of 16
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    config = ModelConfig(backbone="test_vit", weights=str(tmp_path / "vit.safetensors"))
    require_weights(config, side)
    backbone = load_backbone(config, side)
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(backbone(images), vit.forward_features(images)[:, 0], rtol=1e-5, atol=1e-5)


def test_pth_weights(tmp_path: Path, trunk: Backbone) -> None:
    torch.save({"state_dict": trunk.vit.state_dict(), "epoch": 3}, tmp_path / "tiny.pth")
    backbone = load_backbone(ModelConfig(backbone="tiny", weights=str(tmp_path / "tiny.pth")), 8)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(backbone(images), trunk(images))


def mae(state: dict) -> dict:
    """With the decoder that pretraining needs, as RETFound's files have it."""
    decoder = {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(8, 64)}
    return {"model": state | decoder | {"decoder_blocks.0.norm1.bias": torch.zeros(8)}, "epoch": 799}


def dino(state: dict) -> dict:
    backbone = {f"backbone.{name}": tensor for name, tensor in state.items()}
    return {"teacher": backbone | {"head.mlp.0.weight": torch.zeros(8, 64)}, "student": {"module.x": torch.zeros(1)}}


@pytest.mark.parametrize("layout", [mae, dino])
def test_weights_as_self_supervised_training_leaves_them(tmp_path: Path, trunk: Backbone, layout: Callable) -> None:
    torch.save(layout(trunk.vit.state_dict()), tmp_path / "tiny.pth")
    config = ModelConfig(backbone="tiny", weights=str(tmp_path / "tiny.pth"))
    require_weights(config, 8)
    backbone = load_backbone(config, 8)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(backbone(images), trunk(images))


def test_weights_from_before_torch_wrote_archives(tmp_path: Path, trunk: Backbone) -> None:
    torch.save(trunk.vit.state_dict(), tmp_path / "tiny.pth", _use_new_zipfile_serialization=False)
    config = ModelConfig(backbone="tiny", weights=str(tmp_path / "tiny.pth"))
    require_weights(config, 8)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_backbone(config, 8)(images), trunk(images))


def test_all_misfits_come_in_one_message_and_change_nothing(tmp_path: Path, trunk: Backbone) -> None:
    state = trunk.vit.state_dict()
    del state["norm.weight"]
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    state["blocks.0.norm1.bias"] = state["blocks.0.norm1.bias"] + 5
    state["surplus"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(1000, 64)
    save_file(state, tmp_path / "odd.safetensors")
    before = {name: tensor.clone() for name, tensor in trunk.vit.state_dict().items()}
    with pytest.raises(ValueError) as misfit:
        trunk.load(str(tmp_path / "odd.safetensors"))
    assert str(misfit.value).endswith(
        "odd.safetensors do not fit the backbone: missing: norm.weight; unexpected: surplus;"
        " of another shape: blocks.0.mlp.fc1.weight (3, 3) where (256, 64) is expected"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.vit.state_dict().items())


@pytest.mark.parametrize("other", ["vit_tiny_patch16_224", "resnet18", "test_vit2"])
def test_weights_of_another_model(tmp_path: Path, other: str) -> None:
    save_file(timm.create_model(other, num_classes=0).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="do not fit the backbone: "):
        load_backbone(ModelConfig(backbone="test_vit", weights=str(tmp_path / "other.safetensors")), 64)
    with pytest.raises(ValueError, match="do not fit the backbone: "):
        require_weights(ModelConfig(backbone="test_vit", weights=str(tmp_path / "other.safetensors")), 64)


def test_a_kernel_of_another_patch_size_is_not_resampled(tmp_path: Path) -> None:
    small = load_backbone(ModelConfig(backbone="tiny"), 8)  # patches of 2
    save_file(small.vit.state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight \(64, 3, 2, 2\) where \(64, 3, 4, 4\)"):
        load_backbone(ModelConfig(backbone="tiny", weights=str(tmp_path / "tiny.safetensors")), 16)


def test_image_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_backbone(ModelConfig(backbone="tiny"), 0)


@pytest.mark.parametrize("adapter", sorted(ADAPTERS.keys() - {"vpt", "rlrr"}))  # which begin with something random
@pytest.mark.parametrize("training", [False, True])
def test_adapted_backbone_starts_bit_identical(trunk: Backbone, adapter: str, training: bool) -> None:
    images = torch.randn(3, 3, 8, 8)
    tokens = torch.randn(3, 1, 64)
    backbone = adapted(trunk, ModelConfig(adapter=adapter, fusion="late")).train(training)
    assert torch.equal(backbone(images), trunk(images))
    if adapter != "losa":
        assert torch.equal(backbone(images, tokens), trunk(images, tokens))


@pytest.mark.parametrize(
    ("settings", "ranks", "bypass"),
    [
        ({"adapter": "mor"}, (2, 4, 8), True),
        ({"adapter": "mor", "bypass": False}, (2, 4, 8), False),
        ({"adapter": "mor", "ranks": (3, 5)}, (3, 5), True),
        ({"adapter": "lora"}, (4,), False),
        ({"adapter": "lora", "ranks": (16,)}, (16,), False),
        ({"adapter": "loramoe"}, (4, 4, 4), False),
        ({"adapter": "loramoe", "ranks": (2, 2)}, (2, 2), False),
    ],
)
def test_adapters(trunk: Backbone, settings: dict, ranks: tuple[int, ...], bypass: bool) -> None:
    backbone = adapted(trunk, ModelConfig(**settings))
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, mor.MoRLinear)}
    assert list(layers) == [f"vit.blocks.{block}.mlp.{fc}" for block in range(4) for fc in ("fc1", "fc2")]
    for layer in layers.values():
        assert (layer.config.ranks, layer.config.bypass) == (ranks, bypass)
        assert set(layer.config.scaling) == {2.0}


def test_alphas_dropout_and_targets_are_passed_on(trunk: Backbone) -> None:
    backbone = adapted(trunk, ModelConfig(targets=("qkv",), alphas=(1.0, 2.0, 3.0), dropout=0.5))
    layer = backbone.vit.blocks[3].attn.qkv
    assert (layer.config.alphas, layer.config.dropout) == ((1.0, 2.0, 3.0), 0.5)
    assert isinstance(backbone.vit.blocks[3].mlp.fc1, nn.Linear)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora", "ranks": (2, 4)}, "ranks must be a single rank with adapter 'lora', got"),
        ({"adapter": "loramoe", "ranks": (4,)}, "two or more equal ones with adapter 'loramoe'"),
        ({"adapter": "loramoe", "ranks": (4, 8)}, "two or more equal ones with adapter 'loramoe'"),
        ({"adapter": "mor", "alphas": (4.0,)}, "one value per rank"),
        ({"targets": ("nonsense",)}, "target 'nonsense' matches no"),
    ],
)
def test_bad_adapters(trunk: Backbone, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(trunk, ModelConfig(**settings))


def test_the_trunk_is_left_alone(trunk: Backbone) -> None:
    images = torch.randn(1, 3, 8, 8)
    before = trunk(images)
    for adapter in ("mor", "full", "frozen"):
        backbone = adapted(trunk, ModelConfig(adapter=adapter))
        with torch.no_grad():
            for parameter in mor.trainable_parameters(backbone).values():
                parameter.add_(1)
    assert torch.equal(trunk(images), before)
    assert mor.trainable_parameters(trunk) == {}
    assert not any(isinstance(module, mor.MoRLinear) for module in trunk.modules())


def test_full_trains_everything_and_uses_it(trunk: Backbone) -> None:
    backbone = adapted(trunk, ModelConfig(adapter="full"))
    backbone(torch.randn(2, 3, 8, 8), torch.randn(2, 1, 64)).square().sum().backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in backbone.parameters())
    shared = {id(parameter) for parameter in trunk.parameters()}
    assert not shared & {id(parameter) for parameter in backbone.parameters()}
