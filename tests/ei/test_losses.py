"""The loss against its formula, on numbers that a reader can check."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss

from ei.data.sample import Batch
from ei.losses import classification_loss, gate_loss, loss_terms, shares
from ei.models.output import Output

WEIGHTS = {"aux_weight": 0.3, "gate_weight": 0.1}


@pytest.fixture
def output() -> Output:
    def logits() -> torch.Tensor:
        return torch.randn(5, 3, requires_grad=True)

    return Output(
        logits=logits(),
        modality_logits={"a": logits(), "b": logits()},
        aux_logits={"a": logits(), "b": logits()},
        modality_weights=torch.rand(5, 2).softmax(1),
    )


@pytest.mark.parametrize("several", [False, True])
def test_the_whole_loss(output: Output, several: bool) -> None:
    labels = torch.randint(0, 2, (5, 3)).float() if several else torch.tensor([0, 1, 2, 0, 1])
    ce = F.binary_cross_entropy_with_logits if several else F.cross_entropy
    terms = loss_terms(output, labels, gate_prior="b", **WEIGHTS)
    assert list(terms) == ["fused", "modality", "auxiliary", "gate", "total"]
    a, b = output.modality_logits.values()
    aux_a, aux_b = output.aux_logits.values()
    torch.testing.assert_close(terms["fused"], ce(output.logits, labels))
    torch.testing.assert_close(terms["modality"], ce(a, labels) + ce(b, labels))
    torch.testing.assert_close(terms["auxiliary"], ce(aux_a, labels) + ce(aux_b, labels))
    torch.testing.assert_close(terms["gate"], -output.modality_weights[:, 1].log().mean())
    total = terms["fused"] + terms["modality"] + 0.3 * terms["auxiliary"] + 0.1 * terms["gate"]
    torch.testing.assert_close(terms["total"], total)


def test_a_perfect_gate_costs_nothing(output: Output) -> None:
    assert float(gate_loss(torch.tensor([1.0]))) == 0.0


def test_one_modality_counts_once() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    terms = loss_terms(Output(logits, {"oct": logits}), labels, gate_prior=None, **WEIGHTS)
    assert list(terms) == ["modality", "total"]
    torch.testing.assert_close(terms["total"], F.cross_entropy(logits, labels))


def test_a_model_without_branches_is_judged_by_its_answer() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    terms = loss_terms(Output(logits), labels, gate_prior="a", **WEIGHTS)
    assert list(terms) == ["fused", "total"]
    torch.testing.assert_close(terms["total"], F.cross_entropy(logits, labels))


def test_without_a_prior_there_is_no_gate_term(output: Output) -> None:
    assert "gate" not in loss_terms(output, torch.zeros(5, dtype=torch.int64), gate_prior=None, **WEIGHTS)


def test_bf16_logits_are_computed_in_fp32() -> None:
    exact = torch.randn(64, 10)
    rounded, labels = exact.bfloat16(), torch.randint(0, 10, (64,))
    for target in (labels, F.one_hot(labels, 10).float()):
        loss = classification_loss(rounded, target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, classification_loss(rounded.float(), target), rtol=0, atol=0)


def test_fp64_is_not_narrowed() -> None:
    logits = torch.zeros(1, 3, dtype=torch.float64)
    assert float(classification_loss(logits, torch.tensor([0]))) == pytest.approx(math.log(3), abs=1e-15)


def test_a_weight_that_underflowed_keeps_the_loss_finite() -> None:
    logits = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    weights = logits.softmax(1)
    assert float(weights[0, 0].detach()) == 0.0
    loss = gate_loss(weights[:, 0])
    loss.backward()
    assert 87 < float(loss.detach()) < 88 and logits.grad is not None and logits.grad.isfinite().all()


def test_the_gate_is_pulled_to_the_prior() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)
    gate_loss(scores.softmax(1)[:, 2]).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[1 / 3, 1 / 3, -2 / 3]]))


def test_a_prior_that_is_no_modality(output: Output) -> None:
    with pytest.raises(ValueError, match="gate_prior must be one of a, b, got 'c'"):
        loss_terms(output, torch.zeros(5, dtype=torch.int64), gate_prior="c", **WEIGHTS)


def parts_of(output: Output, rows: slice) -> Output:
    def cut(each: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: logits[rows] for name, logits in each.items()}

    return Output(
        output.logits[rows], cut(output.modality_logits), cut(output.aux_logits), output.modality_weights[rows]
    )


def batch_of(has: dict[str, list[bool]], *, counts: bool = True) -> Batch:
    present = {name: torch.tensor(marks)[:, None] for name, marks in has.items()}
    return Batch({}, present, ids=[str(row) for row in range(len(has["a"]))], counts=counts)


def test_batches_of_a_step_add_up_to_the_whole(output: Output) -> None:
    """Cut unevenly, with a sample that does not count, and with modalities that are missing."""
    has = {"a": [True, True, False, True, True], "b": [True, False, False, True, True]}
    labels = torch.tensor([0, 1, 2, 0, 1])
    given = {"gate_prior": "b", "class_weights": torch.tensor([1.0, 2.0, 0.5]), **WEIGHTS}
    whole = loss_terms(output, labels, shares=shares([batch_of(has)])[0], **given)
    cuts = [slice(0, 2), slice(2, 5), slice(0, 1)]
    batches = [
        batch_of({name: marks[rows] for name, marks in has.items()}, counts=number < 2)
        for number, rows in enumerate(cuts)
    ]
    each = [
        loss_terms(parts_of(output, rows), labels[rows], shares=share, **given)
        for rows, share in zip(cuts, shares(batches), strict=True)
    ]
    for name, term in whole.items():
        torch.testing.assert_close(sum(terms[name] for terms in each), term)
    assert all(float(term.detach()) == 0 for term in each[2].values())


def test_what_is_missing_has_no_part(output: Output) -> None:
    has = {"a": [True] * 5, "b": [True, False, False, True, True]}
    labels = torch.tensor([0, 1, 2, 0, 1])
    terms = loss_terms(output, labels, shares=shares([batch_of(has)])[0], gate_prior="b", **WEIGHTS)
    there = torch.tensor(has["b"])
    for name, logits in (("modality", output.modality_logits), ("auxiliary", output.aux_logits)):
        expected = F.cross_entropy(logits["a"], labels) + F.cross_entropy(logits["b"][there], labels[there])
        torch.testing.assert_close(terms[name], expected)
    torch.testing.assert_close(terms["gate"], -output.modality_weights[there, 1].log().mean())
    torch.testing.assert_close(terms["fused"], F.cross_entropy(output.logits, labels))


def test_penalties_are_means_over_the_samples_of_a_step() -> None:
    """Under names of their own, and with the weights that they have."""
    values, labels = torch.tensor([1.0, 2.0, 6.0, 0.5, 0.5]), torch.zeros(5, dtype=torch.int64)
    marks = [True] * 5
    cuts = [slice(0, 2), slice(2, 5), slice(0, 1)]
    batches = [batch_of({"a": marks[rows]}, counts=number < 2) for number, rows in enumerate(cuts)]
    each = [
        loss_terms(
            Output(torch.zeros(5, 3)[rows], penalties={"cost": values[rows]}),
            labels[rows],
            shares=share,
            gate_prior=None,
            **WEIGHTS,
        )
        for rows, share in zip(cuts, shares(batches), strict=True)
    ]
    assert list(each[0]) == ["fused", "cost", "total"]
    assert float(sum(terms["cost"] for terms in each)) == pytest.approx(2.0)
    assert float(sum(terms["total"] for terms in each)) == pytest.approx(2.0 + math.log(3))


def test_a_modality_that_nobody_has_costs_nothing(output: Output) -> None:
    has = {"a": [True] * 5, "b": [False] * 5}
    share = shares([batch_of(has)])[0]
    terms = loss_terms(output, torch.zeros(5, dtype=torch.int64), shares=share, gate_prior="b", **WEIGHTS)
    terms["total"].backward()
    assert float(terms["gate"].detach()) == 0 and float(output.modality_logits["b"].grad.abs().sum()) == 0


def test_class_weights_are_scikit_learns() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 0])
    weights = torch.tensor([0.5, 1.0, 4.0])
    expected = log_loss(
        labels.numpy(), logits.double().softmax(1).numpy(), sample_weight=weights[labels].numpy(), normalize=False
    )
    assert float(classification_loss(logits, labels, class_weights=weights)) == pytest.approx(expected / 6, rel=1e-5)
    flags = torch.randint(0, 2, (6, 3)).float()
    expected = F.binary_cross_entropy_with_logits(logits, flags, pos_weight=weights)
    torch.testing.assert_close(classification_loss(logits, flags, class_weights=weights), expected)


@pytest.mark.parametrize("labels", [torch.zeros(5, 1), torch.zeros(5), torch.zeros(4, dtype=torch.int64)])
def test_labels_of_another_shape(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels must be .* for logits \(5, 3\), got"):
        classification_loss(torch.zeros(5, 3), labels)
