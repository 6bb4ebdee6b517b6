"""VPT-deep: prompts enter before each block and leave after it."""

import math

import pytest
import torch
from torch import Tensor

from ei.config import ModelConfig
from ei.models.backbone import adapted
from ei.models.vit import Backbone


@pytest.fixture
def backbone(trunk: Backbone) -> Backbone:
    return adapted(trunk, ModelConfig(adapter="vpt", prompts=3))


def inputs_of_blocks(backbone: Backbone, *arguments: Tensor) -> list[Tensor]:
    """(N, T, D) of each block, prompts included."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        for block in backbone.vit.blocks
    ]
    backbone(*arguments)
    for hook in hooks:
        hook.remove()
    return seen


def test_equals_the_blocks_with_prompts_in_between(backbone: Backbone) -> None:
    """Behind the class token, or anywhere else: a ViT's attention does not care."""
    images, tokens = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 64)
    x = torch.cat([backbone._embed(images), tokens], dim=1)
    length = x.shape[1]
    for prompts, block in zip(backbone.prompts, backbone.vit.blocks, strict=True):
        x = block(torch.cat([x, prompts.expand(2, -1, -1)], dim=1))[:, :length]
    torch.testing.assert_close(backbone(images, tokens), backbone.vit.norm(x)[:, 0], rtol=1e-4, atol=1e-5)


def test_every_block_has_its_own_and_they_do_not_add_up(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 8, 8)
    inputs = inputs_of_blocks(backbone, images)
    assert [x.shape[1] for x in inputs] == [17 + 3] * 4
    for x, prompts in zip(inputs, backbone.prompts, strict=True):
        assert torch.equal(x[:, 1:4], prompts.detach().expand(2, -1, -1))


@pytest.mark.parametrize("block", range(4))
def test_prompts_of_a_block_reach_no_earlier_one(backbone: Backbone, block: int) -> None:
    images = torch.randn(2, 3, 8, 8)
    before, out = inputs_of_blocks(backbone, images), backbone(images)
    with torch.no_grad():
        backbone.prompts[block].normal_()
    after = inputs_of_blocks(backbone, images)
    own = [torch.cat([x[:, :1], x[:, 4:]], dim=1) for x in before], [torch.cat([x[:, :1], x[:, 4:]], 1) for x in after]
    changed = [not torch.equal(one, other) for one, other in zip(*own, strict=True)]
    assert changed == [index > block for index in range(4)]
    assert not torch.equal(backbone(images), out)


@pytest.mark.parametrize("block", range(4))
def test_what_comes_out_at_prompts_is_dropped(backbone: Backbone, block: int) -> None:
    images, tokens = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 64)
    expected = backbone(images, tokens)

    def spoil(_: object, __: object, x: Tensor) -> Tensor:
        return x.index_fill(1, torch.arange(1, 4), math.nan)

    backbone.vit.blocks[block].register_forward_hook(spoil)
    assert torch.equal(backbone(images, tokens), expected)


def test_tokens_that_are_not_seen_are_as_if_absent(backbone: Backbone) -> None:
    """And prompts are seen beside them."""
    images, tokens = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 64)
    mask = torch.tensor([[True, False], [False, False]])
    some = backbone(images, tokens, mask)
    torch.testing.assert_close(some[:1], backbone(images[:1], tokens[:1, :1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some[1:], backbone(images[1:]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        backbone.prompts.normal_()
    assert (backbone(images, tokens, mask) - some).abs().amin(0).max() > 1e-3


def test_where_prompts_start(trunk: Backbone) -> None:
    """U(-v, v), v = sqrt(6 / (3 * 2 * 2 + 64)), by the patch size and the width."""
    prompts = adapted(trunk, ModelConfig(adapter="vpt", prompts=200)).prompts
    limit = math.sqrt(6 / 76)
    assert 0.99 * limit < prompts.abs().max() <= limit
    assert prompts.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
