"""RLRR: weights rescaled by a matrix of rank one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mor
from ei.config import ModelConfig
from ei.models.adapters.rlrr import RescaledLinear, ScaledShifted
from ei.models.backbone import adapted, load_backbone
from ei.models.vit import Backbone


@pytest.mark.parametrize("packed", [1, 3])
def test_equals_its_formula_for_each_projection(packed: int) -> None:
    base = nn.Linear(4, 6)
    layer = RescaledLinear(base, packed)
    nn.init.normal_(layer.shift)
    x = torch.randn(5, 4)
    each = []
    for number, (weight, bias) in enumerate(zip(base.weight.chunk(packed), base.bias.chunk(packed), strict=True)):
        rows = layer.row_scale.chunk(packed)[number]  # (O / P, 1)
        columns = layer.column_scale[number][None]  # (1, K)
        each.append(F.linear(x, weight + weight * (rows @ columns), bias + layer.shift.chunk(packed)[number]))
    torch.testing.assert_close(layer(x), torch.cat(each, dim=1))


def test_a_layer_without_bias_gets_one() -> None:
    layer = RescaledLinear(nn.Linear(4, 6, bias=False), 1)
    with torch.no_grad():
        layer.shift.fill_(2)
    assert torch.equal(layer(torch.zeros(1, 4)), torch.full((1, 6), 2.0))


def test_q_k_and_v_are_rescaled_apart(trunk: Backbone) -> None:
    backbone = adapted(trunk, ModelConfig(adapter="rlrr"))
    layers = {
        name: len(layer.column_scale)
        for name, layer in backbone.vit.blocks[0].named_modules()
        if isinstance(layer, RescaledLinear)
    }
    assert layers == {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}


def test_where_it_starts(trunk: Backbone) -> None:
    """Not at the frozen backbone: kaiming_uniform of a column and of a row has the bounds sqrt(6) and sqrt(6 / K)."""
    block = adapted(trunk, ModelConfig(adapter="rlrr")).vit.blocks[0]
    for layer, inputs in ((block.attn.qkv, 64), (block.mlp.fc2, 256)):
        assert 0.9 * math.sqrt(6) < layer.row_scale.abs().max() <= math.sqrt(6)
        assert 0.9 * math.sqrt(6 / inputs) < layer.column_scale.abs().max() <= math.sqrt(6 / inputs)
        assert not layer.shift.any()
    assert 0.01 < (block.norm1.scale - 1).std() < 0.03 and 0.01 < block.norm1.shift.std() < 0.03
    assert abs(block.norm1.scale.mean() - 1) < 0.02


def test_without_scales_and_shifts_it_is_the_frozen_backbone(trunk: Backbone) -> None:
    backbone = adapted(trunk, ModelConfig(adapter="rlrr"))
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, RescaledLinear):
                module.row_scale.zero_()
            if isinstance(module, ScaledShifted):
                module.scale.fill_(1), module.shift.zero_()
    images, tokens = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 64)
    assert torch.equal(backbone(images, tokens), trunk(images, tokens))


def test_patches_may_be_left_as_they_are(trunk: Backbone) -> None:
    with_them, without = (adapted(trunk, ModelConfig(adapter="rlrr", scale_patches=yes)) for yes in (True, False))
    difference = mor.trainable_parameters(with_them).keys() - mor.trainable_parameters(without).keys()
    assert difference == {"vit.patch_embed.scale", "vit.patch_embed.shift"}


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32", "vit_base_patch16_xp_224"])
def test_backbones_without_such_layers_are_refused(name: str) -> None:
    config = ModelConfig(adapter="rlrr", backbone=name, pretrained=False)
    with torch.device("meta"):
        trunk = load_backbone(config, 32)
        with pytest.raises(ValueError, match="adapter 'rlrr' needs a backbone from timm, with blocks of one"):
            adapted(trunk, config)
