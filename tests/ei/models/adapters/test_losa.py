"""LoSA: a network beside the backbone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mor
from ei.config import ModelConfig
from ei.models.backbone import adapted
from ei.models.vit import Backbone


def with_side(trunk: Backbone, **settings: object) -> Backbone:
    """After its start, when it changes something."""
    backbone = adapted(trunk, ModelConfig(adapter="losa", fusion="late", **settings))
    with torch.no_grad():
        for parameter in mor.trainable_parameters(backbone).values():
            parameter.normal_(std=0.3)
    return backbone


def test_equals_its_formula(trunk: Backbone) -> None:
    backbone = with_side(trunk, ranks=(3,), blocks=(0, 2, 3))
    images = torch.randn(2, 3, 8, 8)
    x, y = trunk._embed(images), torch.zeros(2, 17, 64)
    for index, block in enumerate(trunk.vit.blocks):
        x = block(x)
        if index in (0, 2, 3):
            mixer = backbone.side.mixers[str(index)]
            u = x + y
            u = u + mlp(mixer.token_mlp, norm(mixer.token_norm, u).mT).mT
            u = u + mlp(mixer.channel_mlp, norm(mixer.channel_norm, u))
            y = u - x
    torch.testing.assert_close(backbone(images), trunk.vit.norm(u)[:, 0], rtol=1e-4, atol=1e-5)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, (64,)) * layer.weight + layer.bias


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    hidden = F.gelu(x @ layers[0].weight.T + layers[0].bias)
    assert hidden.shape[-1] == 3
    return hidden @ layers[2].weight.T + layers[2].bias


def test_no_gradient_enters_the_backbone(trunk: Backbone) -> None:
    backbone = with_side(trunk)
    outputs: list[Tensor] = []
    backward: list[nn.Module] = []
    for block in backbone.vit.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
        block.register_full_backward_hook(lambda module, *_: backward.append(module))
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    backbone(images).square().sum().backward()
    assert len(outputs) == 4
    assert not any(output.requires_grad or output.grad_fn for output in outputs)
    assert not backward and images.grad is None
    assert all(parameter.grad.any() for parameter in mor.trainable_parameters(backbone).values())


def test_blocks_are_read_up_to_the_last_by_default(trunk: Backbone) -> None:
    assert list(with_side(trunk).side.mixers) == ["1", "3"]


def test_a_summary_of_an_earlier_block_knows_no_later_one(trunk: Backbone) -> None:
    backbone = with_side(trunk, blocks=(1, 3))
    images = torch.randn(2, 3, 8, 8)
    first, second, last = backbone(images, read_from=(1, 2, 4))
    assert torch.equal(first, trunk(images, read_from=1))
    with torch.no_grad():
        backbone.side.mixers["3"].channel_norm.bias.add_(1)
    _, again, changed = backbone(images, read_from=(1, 2, 4))
    assert torch.equal(second, again) and not torch.equal(second, trunk(images, read_from=2))
    assert not torch.equal(changed, last)
