"""Attention pooling as its formula has it, and blind to the order of a bag."""

import pytest
import torch
from torch import nn

from ei.baselines.mm_mil import AttentionPooling


@pytest.fixture
def pooling() -> AttentionPooling:
    return AttentionPooling(6, heads=3, hidden=4)


def test_pooling_is_its_formula_head_by_head(pooling: AttentionPooling) -> None:
    instances, there = torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)
    pooled, attention = pooling(instances, there)
    for head in range(3):
        one = nn.Linear(6, 4)
        with torch.no_grad():
            one.weight.copy_(pooling.hidden.weight[4 * head : 4 * head + 4])
            one.bias.copy_(pooling.hidden.bias[4 * head : 4 * head + 4])
        expected = (one(instances).tanh() @ pooling.score[head]).softmax(1)
        torch.testing.assert_close(attention[:, head], expected)
        torch.testing.assert_close(pooled[:, head], (expected[..., None] * instances).sum(1))


def test_the_order_of_a_bag_does_not_matter(pooling: AttentionPooling) -> None:
    instances, there = torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True, False, True, True, False]])
    order = torch.tensor([3, 0, 4, 2, 1])
    pooled, attention = pooling(instances, there)
    moved, moved_attention = pooling(instances[:, order], there[:, order])
    torch.testing.assert_close(moved, pooled)
    torch.testing.assert_close(moved_attention, attention[:, :, order])


def test_what_is_not_there_gets_no_attention(pooling: AttentionPooling) -> None:
    instances, there = torch.randn(1, 4, 6), torch.tensor([[True, False, True, False]])
    pooled, attention = pooling(instances, there)
    assert torch.equal(attention > 0, there[:, None].expand(1, 3, 4))
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 3))
    torch.testing.assert_close(pooled, pooling(instances[:, [0, 2]], there[:, [0, 2]])[0])


def test_modalities_may_be_swapped(build, make_batch) -> None:
    """One bag: with one ViT in both roles, it does not matter which image is of which modality."""
    model = build("mm-mil")
    model.encoders["modality_oct"].backbone = model.encoders["modality_cfp"].backbone
    batch = make_batch(cfp=(1, 2), oct=(2, 1))
    swapped = type(batch)(
        images={"cfp": batch.images["oct"], "oct": batch.images["cfp"]},
        present={"cfp": batch.present["oct"], "oct": batch.present["cfp"]},
    )
    one, other = model(batch), model(swapped)
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.modality_weights, other.modality_weights.flip(1))


def test_the_prediction_is_the_mean_over_heads(build, make_batch) -> None:
    model, batch = build("mm-mil"), make_batch(cfp=(1, 2), oct=(2, 1))
    instances = torch.cat([model.encoder(name).by_image(batch) for name in ("cfp", "oct")], dim=1)
    pooled, _ = model.fusion(instances, torch.cat([batch.present[name] for name in ("cfp", "oct")], dim=1))
    torch.testing.assert_close(model(batch).logits, torch.stack([model.head(pooled[:, j]) for j in range(2)]).mean(0))
