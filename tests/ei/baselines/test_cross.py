"""Patches of each modality look at those of the others."""

import torch

from ei.baselines.cross import Looking


def test_without_keys_it_is_the_norm_of_the_queries() -> None:
    looking = Looking(8, 2)
    queries, keys = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    there = torch.tensor([[True, True, False, False], [False] * 4])
    found, weights = looking(queries, keys, there, with_weights=True)
    torch.testing.assert_close(found[1], looking.norm(queries[1]))
    torch.testing.assert_close(found[:1], looking(queries[:1], keys[:1, :2], there[:1, :2])[0])
    assert weights.shape == (2, 3, 4) and not weights[0, :, 2:].any() and not weights[1].any()
    torch.testing.assert_close(weights[0].sum(1), torch.ones(3))


def test_attention_is_given_for_each_modality(build, make_batch) -> None:
    model = build("cross", ("cfp", "faf", "oct")).eval()
    attention = model.attention(make_batch(cfp=(1, 1), faf=(1, 0), oct=(1, 0)))
    assert {name: tuple(values.shape) for name, values in attention.items()} == dict.fromkeys(
        ("cfp", "faf", "oct"), (2, 16, 32)
    )
    torch.testing.assert_close(attention["cfp"][0].sum(1), torch.ones(16))
    assert not attention["cfp"][1].any()
    torch.testing.assert_close(attention["oct"][1, :, :16].sum(1), torch.ones(16))  # it sees cfp, which comes first


def test_the_other_modality_makes_a_difference(build, make_batch) -> None:
    model = build("cross").eval()
    batch = make_batch(cfp=(1,), oct=(1,))
    other = type(batch)(images={**batch.images, "oct": -batch.images["oct"]}, present=batch.present)
    assert not torch.allclose(model(batch).logits, model(other).logits, atol=1e-4)
