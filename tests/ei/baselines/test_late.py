"""Four rules that make one prediction of several."""

import pytest
import torch
from torch import nn

from ei.baselines.late import Average, Learned, Maximum, Weighted

LOGITS = [torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, -1.0]]), torch.tensor([[2.0, 2.0]])]
ALL, TWO = torch.tensor([[True, True, True]]), torch.tensor([[True, False, True]])


def rules() -> dict[str, nn.Module]:
    weighted = Weighted(3)
    with torch.no_grad():
        weighted.scores.copy_(torch.tensor([0.0, 1.0, 2.0]))
    return {"average": Average(), "weighted": weighted, "max": Maximum(), "learned": Learned(3, 2, 8)}


def test_by_hand() -> None:
    each = rules()
    assert each["average"]([], LOGITS, ALL)[0].tolist() == [[2.0, 2.0]]
    assert each["average"]([], LOGITS, TWO)[0].tolist() == [[1.5, 3.5]]
    assert each["max"]([], LOGITS, ALL)[0].tolist() == [[3.0, 5.0]]
    assert each["max"]([], LOGITS, TWO)[0].tolist() == [[2.0, 5.0]]
    logits, weights = each["weighted"]([], LOGITS, TWO)
    torch.testing.assert_close(
        weights, torch.tensor([[0.0, 2.0]]).softmax(1)[:, [0, 0, 1]] * torch.tensor([1.0, 0.0, 1.0])
    )
    torch.testing.assert_close(logits, weights[:, :1] * LOGITS[0] + weights[:, 2:] * LOGITS[2])


def test_learned_weights_start_as_the_mean() -> None:
    torch.testing.assert_close(Weighted(3)([], LOGITS, TWO)[0], Average()([], LOGITS, TWO)[0])


@pytest.mark.parametrize("name", ["average", "max", "weighted"])
def test_an_absent_modality_might_never_have_been_there(name: str) -> None:
    logits = rules()[name]([], LOGITS, TWO)[0]
    if name == "weighted":
        smaller = Weighted(2)
        with torch.no_grad():
            smaller.scores.copy_(torch.tensor([0.0, 2.0]))
    else:
        smaller = rules()[name]
    torch.testing.assert_close(smaller([], [LOGITS[0], LOGITS[2]], ALL[:, :2])[0], logits)
    changed = [LOGITS[0], torch.tensor([[100.0, 100.0]]), LOGITS[2]]
    assert torch.equal(rules()[name]([], changed, TWO)[0], logits)


@pytest.mark.parametrize("name", ["average", "max"])
def test_the_order_of_modalities_does_not_matter(name: str) -> None:
    rule, order = rules()[name], [2, 0, 1]
    moved = rule([], [LOGITS[index] for index in order], TWO[:, order])[0]
    assert torch.equal(moved, rule([], LOGITS, TWO)[0])


def test_the_learned_rule_does_not_see_what_is_absent() -> None:
    rule = rules()["learned"]
    logits = rule([], LOGITS, TWO)[0]
    assert torch.equal(rule([], [LOGITS[0], torch.full((1, 2), 9.0), LOGITS[2]], TWO)[0], logits)
    assert not torch.equal(rule([], LOGITS, ALL)[0], logits)


def test_the_fused_loss_reaches_the_branches(build, make_batch) -> None:
    model = build("late-average")
    model(make_batch(cfp=(1,), oct=(1,))).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_they_start_from_a_first_stage(build) -> None:
    import mor

    model = build("late-max")
    stage1 = {
        name: {key: torch.ones_like(value) for key, value in mor.trainable_parameters(model._primary(name)).items()}
        for name in ("cfp", "oct")
    }
    model.start_from(stage1)
    learned = {key: value for key, value in mor.trainable_parameters(model).items() if "head" not in key}
    assert learned and all(bool((value == 1).all()) for value in learned.values())
