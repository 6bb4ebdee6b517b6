"""A gate that chooses among experts."""

import pytest
import torch

from ei.baselines.dynmm import choice

USABLE = torch.tensor([[True, False, True], [True, True, True]])


def test_a_hard_choice_has_the_gradient_of_the_soft_one() -> None:
    values = torch.randn(2, 3)
    found = []
    for hard in (True, False):
        scores = torch.tensor([[0.5, 9.0, 1.0], [0.2, 0.1, -0.3]], requires_grad=True)
        gate = choice(scores, USABLE, hard=hard)
        (gate * values).sum().backward()
        found.append((gate.detach(), scores.grad))
    (taken, straight), (soft, gradient) = found
    torch.testing.assert_close(taken, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(soft.sum(1), torch.ones(2))
    assert soft[0, 1] == 0 and soft.argmax(1).tolist() == [2, 0]
    torch.testing.assert_close(straight, gradient)
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hard", [False, True])
def test_it_is_its_formula(build, make_batch, hard: bool, training: bool) -> None:
    model = build("dynmm", dynmm_hard=hard, dynmm_cost=0.5, dynmm_temperature=2.0).train(training)
    output = model(batch := make_batch(cfp=(1, 1), oct=(1, 0)))
    joined = torch.cat([model.encoder(name).summaries(batch)[0] for name in ("cfp", "oct")], dim=1)
    scores = (model.fusion(joined) / 2).masked_fill(torch.tensor([[False] * 3, [False, True, False]]), -torch.inf)
    gate = scores.softmax(1)
    if hard:
        gate = torch.eye(3)[gate.argmax(1)]
    each = torch.stack([*output.modality_logits.values(), model.head(joined)], dim=1)
    torch.testing.assert_close(output.logits, (gate[..., None] * each).sum(1))
    torch.testing.assert_close(output.penalties["cost"], 0.5 * gate[:, 2])


def test_the_gate_trains_the_vits_that_it_reads(build, make_batch) -> None:
    model = build("dynmm")
    model(make_batch(cfp=(1, 1), oct=(1, 1))).penalties["cost"].sum().backward()
    assert all(item.grad is not None and item.grad.any() for item in model.encoders.parameters() if item.requires_grad)
    assert all(item.grad is None or not item.grad.any() for item in model.experts.parameters())


def test_experts_need_not_have_losses_of_their_own(build, make_batch) -> None:
    model, batch = build("dynmm", dynmm_experts=False), make_batch(cfp=(1,), oct=(1,))
    assert model(batch).modality_logits == {}


def test_the_experts_have_vits_of_their_own(build) -> None:
    model = build("dynmm")
    adapters = {id(item) for item in model.encoders.parameters() if item.requires_grad}
    assert not adapters & {id(item) for item in model.experts.parameters() if item.requires_grad}
