"""Maps of several modalities, weighed place by place."""

import pytest
import torch
from torch import Tensor, nn

from ei.baselines.sfusion import MapFusion, sinusoids


def fusion(side: int, grid: int, modalities: int = 3) -> MapFusion:
    return MapFusion(modalities, 8, side, layers=1, heads=2, grid=grid, dropout=0.0)


@pytest.mark.parametrize(("side", "grid"), [(4, 2), (5, 2), (7, 3), (4, 8), (6, 6)])
def test_weights_of_each_place_and_channel_sum_to_one(side: int, grid: int) -> None:
    maps, has = torch.randn(2, 3, side**2, 8), torch.tensor([[True, True, True], [True, False, True]])
    maps = maps * has[..., None, None]
    fused, weights = fusion(side, grid)(maps, has)
    assert weights.shape == (2, 3, 8, side, side)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 8, side, side))
    assert not weights[1, 1].any() and (weights[1, [0, 2]] > 0).all()
    images = maps.mT.reshape(2, 3, 8, side, side)
    torch.testing.assert_close(fused, (weights * images).sum(1))


@pytest.mark.parametrize("training", [True, False])
def test_an_absent_modality_might_never_have_been_there(training: bool) -> None:
    block = fusion(4, 2).train(training)
    maps, has = torch.randn(2, 3, 16, 8), torch.tensor([[True, False, True]] * 2)
    with torch.set_grad_enabled(training):
        one = block(maps, has)[0]
        maps[:, 1] = 1e3
        torch.testing.assert_close(block(maps, has)[0], one - 0)
        single = torch.tensor([[False, False, True]] * 2)
        torch.testing.assert_close(block(maps, single)[0], maps[:, 2].mT.reshape(2, 8, 4, 4))


def test_the_same_map_everywhere_is_what_comes_out() -> None:
    maps = torch.randn(1, 1, 16, 8).expand(1, 3, 16, 8)
    fused, _ = fusion(4, 2)(maps, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(fused, maps[:, 0].mT.reshape(1, 8, 4, 4))


def test_rows_and_columns_are_not_mixed_up() -> None:
    """A map that is bright in one corner wins there, and stays there."""
    block = fusion(4, 4, modalities=2)

    def first_row(tokens: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return tokens

    block.layers.forward = first_row  # type: ignore[method-assign]
    block.positions.zero_()
    with torch.no_grad():
        block.enlarge[0].weight.copy_(torch.eye(8)[..., None, None])
    maps = torch.zeros(1, 2, 16, 8)
    maps[0, 0, 1] = 5.0  # row 0, column 1
    weights = block(maps, torch.ones(1, 2, dtype=torch.bool))[1]
    assert (weights[0, 0, :, 0, 1] > 0.99).all() and (weights[0, 0, :, 1, 0] == 0.5).all()


def test_the_layers_are_post_norm_and_know_positions() -> None:
    block, maps = fusion(4, 4, modalities=2), torch.randn(1, 2, 16, 8)  # the pooling changes nothing
    block.enlarge = nn.Identity()
    x = maps.flatten(1, 2) + sinusoids(32, 8)
    (layer,) = block.layers.layers
    x = layer.norm1(x + layer.self_attn(x, x, x)[0])
    x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    expected = x.unflatten(1, (2, 16)).mT.unflatten(-1, (4, 4)).softmax(1)
    torch.testing.assert_close(block(maps, torch.ones(1, 2, dtype=torch.bool))[1], expected)


def test_positions() -> None:
    table = sinusoids(50, 8)
    torch.testing.assert_close(table[:, 0], torch.arange(50.0).sin())
    torch.testing.assert_close(table[:, 7], (torch.arange(50.0) / 10_000**0.75).cos())


def test_depth_and_dropout_are_settings(build) -> None:
    model = build("sfusion", sfusion_layers=3, sfusion_dropout=0.25)
    assert len(model.fusion.layers.layers) == 3
    rates = [module.p for module in model.fusion.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.25] * (1 + 3 * 3) and {layer.self_attn.dropout for layer in model.fusion.layers.layers} == {0.25}


def test_what_the_layers_read_is_dropped_in_training_alone() -> None:
    block, read = MapFusion(2, 8, 4, layers=1, heads=2, grid=4, dropout=0.5), []
    block.layers.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    for training in (True, False):
        block.train(training)(torch.randn(1, 2, 16, 8), torch.ones(1, 2, dtype=torch.bool))
    assert 0.3 < float((read[0] == 0).float().mean()) < 0.7 and read[1].all()
