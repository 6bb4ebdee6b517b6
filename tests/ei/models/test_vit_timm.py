"""Backbones from timm against timm's own forward pass."""

import pytest
import timm
import torch
from timm.models import VisionTransformer

from ei.models.vit_timm import TimmBackbone, load_timm, load_tiny, tiny_patch_size

DINOV2 = {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1, "patch_size": 14, "img_size": 28}
CLIP = {"pre_norm": True, "patch_size": 8, "img_size": 32}


@pytest.mark.parametrize("settings", [DINOV2, CLIP, {"patch_size": 8, "img_size": 24, "global_pool": "avg"}])
@pytest.mark.parametrize("training", [False, True])
def test_equals_timm_without_tokens(settings: dict, training: bool) -> None:
    vit = VisionTransformer(embed_dim=32, depth=3, num_heads=2, num_classes=5, **settings)
    for norm in (vit.norm, vit.fc_norm):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, settings["img_size"], settings["img_size"])
    expected = vit.fc_norm(vit.forward_features(images))[:, 0]
    backbone = TimmBackbone(vit, settings["img_size"]).train(training)
    assert torch.equal(backbone(images), expected)
    assert (backbone.width, backbone.depth, backbone.patch_size) == (32, 3, settings["patch_size"])


def test_a_distilled_vit_keeps_both_of_its_tokens() -> None:
    backbone = load_timm("deit_tiny_distilled_patch16_224", 32, published=False)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(backbone(images), backbone.vit.forward_features(images)[:, 0])


def test_nothing_of_a_head_is_left() -> None:
    backbone = load_timm("test_vit", 32, published=False)
    assert not [name for name, _ in backbone.named_parameters() if "head" in name or "attn_pool" in name]


@pytest.mark.parametrize(("side", "patch"), [(8, 2), (28, 7), (32, 8), (48, 12), (224, 56), (37, 5), (3, 1), (1, 1)])
def test_tiny_has_a_few_patches_whatever_the_size(side: int, patch: int) -> None:
    assert tiny_patch_size(side) == patch
    backbone = load_tiny(side)
    assert backbone(torch.zeros(1, 3, side, side)).shape == (1, 64)
    assert side < 4 or 4 <= backbone.vit.patch_embed.grid_size[0] <= 8


def test_position_embeddings_are_not_resampled_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_timm("test_vit", 100, published=False)  # its own size is 160, and dynamic
    assert backbone.vit.pos_embed.shape == (1, 1 + 7 * 7, 64)
    monkeypatch.setattr(timm.models.vision_transformer, "resample_abs_pos_embed", None)
    assert backbone(torch.zeros(1, 3, 100, 100)).shape == (1, 64)
