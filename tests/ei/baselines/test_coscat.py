"""Features side by side, and the cosine that pulls them together."""

import pytest
import torch
import torch.nn.functional as F

from ei.baselines.coscat import cosine_distance
from ei.losses import loss_terms


def test_the_distance_is_that_of_pairs_which_a_sample_has() -> None:
    a, b, c = (torch.randn(4, 5) for _ in range(3))
    has = torch.tensor([[True, True, True], [True, False, True], [False, True, True], [True, False, False]])
    ab, ac, bc = (1 - F.cosine_similarity(*pair) for pair in ((a, b), (a, c), (b, c)))
    expected = torch.stack([(ab[0] + ac[0] + bc[0]) / 3, ac[1], bc[2], torch.tensor(0.0)])
    torch.testing.assert_close(cosine_distance(torch.stack([a, b, c], dim=1), has), expected)


def test_absent_features_of_zeros_have_a_finite_gradient() -> None:
    features = torch.zeros(1, 2, 3, requires_grad=True)
    cosine_distance(features, torch.tensor([[True, False]])).sum().backward()
    assert features.grad is not None and torch.equal(features.grad, torch.zeros(1, 2, 3))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss(build, make_batch, weight: float) -> None:
    model, batch = build("coscat", coscat_cosine=weight), make_batch(cfp=(1, 1), oct=(1, 1))
    output = model(batch)
    features = [model.encoder(name).summaries(batch)[0] for name in ("cfp", "oct")]
    torch.testing.assert_close(output.logits, model.head(torch.cat(features, dim=1)))
    terms = loss_terms(output, batch.labels, aux_weight=0.3, gate_weight=0.1, gate_prior=None)
    assert list(terms) == ["fused", "modality", "cosine", "total"]
    expected = weight * (1 - F.cosine_similarity(*features)).mean()
    torch.testing.assert_close(terms["cosine"], expected)
    torch.testing.assert_close(terms["total"], terms["fused"] + terms["modality"] + expected)
