"""Metrics against scikit-learn, torchmetrics, and resampling by repetition of rows."""

import doctest
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional import classification as torchmetrics_functional

from ei.metrics import classification, resampling
from ei.metrics.classification import (
    average_precision,
    compared,
    mcnemar,
    paired_difference,
    roc_auc,
    s2,
    summarise,
    weighted_ap_and_auc,
)
from ei.metrics.resampling import patient_weights

CLASSES = ["a", "b", "c", "d"]


def predictions(samples: int = 60, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C), better than chance and with some ties, and class indices (N,)."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, samples)
    logits = generator.normal(size=(samples, classes)) + 1.2 * np.eye(classes)[labels]
    return logits.round(1), labels


def values(figures: dict) -> dict[str, float | None]:
    return {name: figure["value"] for name, figure in figures.items()}


@st.composite
def tied_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (N,) from few values, labels (N,), and integer weights (W, N), some of them zero."""
    samples = draw(st.integers(1, 14))
    rows = st.lists(st.integers(-2, 2), min_size=samples, max_size=samples)
    logits = np.array(draw(rows), dtype=float)
    positives = np.array(draw(st.lists(st.booleans(), min_size=samples, max_size=samples)))
    weight_rows = st.lists(st.integers(0, 3), min_size=samples, max_size=samples)
    return logits, positives, np.array(draw(st.lists(weight_rows, min_size=1, max_size=3)))


def test_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(classification) == (0, 13)


@given(tied_rows())
@settings(max_examples=80)
def test_weighted_figures_equal_scikit_learn_on_weighted_and_on_repeated_rows(rows) -> None:
    logits, positives, weights = rows
    ap, auc = weighted_ap_and_auc(logits, positives, weights)
    for index, weight in enumerate(weights):
        repeated_logits, repeated = np.repeat(logits, weight), np.repeat(positives, weight)
        if len(set(repeated)) < 2:
            assert np.isnan(ap[index]) and np.isnan(auc[index])
            continue
        expected_ap = sklearn_metrics.average_precision_score(positives, logits, sample_weight=weight)
        expected_auc = sklearn_metrics.roc_auc_score(positives, logits, sample_weight=weight)
        assert ap[index] == pytest.approx(expected_ap, abs=1e-12)
        assert auc[index] == pytest.approx(expected_auc, abs=1e-12)
        assert ap[index] == pytest.approx(average_precision(repeated_logits, repeated), abs=1e-12)
        assert auc[index] == pytest.approx(roc_auc(repeated_logits, repeated), abs=1e-12)


@given(tied_rows())
@settings(max_examples=100)
def test_weighted_s2_equals_that_of_repeated_rows(rows) -> None:
    logits, positives, weights = rows
    weighted = s2(logits > 0, positives, weights)
    for result, weight in zip(weighted, weights, strict=True):
        repeated = s2(np.repeat(logits > 0, weight), np.repeat(positives, weight))
        np.testing.assert_allclose(result, repeated, atol=1e-12)


@given(tied_rows())
@settings(max_examples=50)
def test_order_of_the_rows_does_not_matter(rows) -> None:
    logits, positives, weights = rows
    assume(len(set(positives)) == 2)
    backwards = weighted_ap_and_auc(logits[::-1], positives[::-1], weights[:, ::-1])
    np.testing.assert_allclose(weighted_ap_and_auc(logits, positives, weights), backwards, atol=1e-12)


def test_values_equal_torchmetrics_multilabel_functions_on_one_hot_labels() -> None:
    logits, labels = predictions()
    result = summarise(logits, labels, ["p"] * 60, CLASSES, multi_label=False)
    scores, one_hot = torch.tensor(logits), torch.eye(4, dtype=torch.long)[torch.tensor(labels)]
    # torchmetrics takes a sigmoid of what lies outside 0..1; a shift into that range keeps every tie.
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    ap = torchmetrics_functional.multilabel_average_precision(scores, one_hot, 4, average="none")
    auc = torchmetrics_functional.multilabel_auroc(scores, one_hot, 4, average="none")
    for index, name in enumerate(CLASSES):
        assert result["per_class"][name]["AP"]["value"] == pytest.approx(float(ap[index]), abs=1e-6)
        assert result["per_class"][name]["AUC"]["value"] == pytest.approx(float(auc[index]), abs=1e-6)
    assert result["overall"]["mAP"]["value"] == pytest.approx(float(ap.mean()), abs=1e-6)
    assert result["overall"]["mAUC"]["value"] == pytest.approx(float(auc.mean()), abs=1e-6)


def test_softmax_before_ranking_would_give_another_number() -> None:
    # The second sample has the higher logit of class a, but the lower probability of it.
    logits, labels = np.array([[1.0, -3.0], [2.0, 4.0]]), np.array([0, 1])
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    result = summarise(logits, labels, ["p", "q"], ["a", "b"], multi_label=False)
    assert result["per_class"]["a"]["AP"]["value"] == 0.5
    assert average_precision(probs[:, 0], labels == 0) == 1.0


@pytest.mark.parametrize("logits", [[100.0, 101.0], [0.0, 1e-9]])
def test_no_sigmoid_and_no_rounding_makes_ties(logits: list[float]) -> None:
    assert roc_auc(logits, [False, True]) == 1.0
    assert weighted_ap_and_auc(logits, [False, True], [[1, 1]])[1] == [1.0]


@pytest.mark.parametrize(
    ("decisions", "positives", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], 0.0),  # sensitivity and specificity both 0
        ([1, 1, 1, 1], [1, 1, 0, 0], 0.0),
        ([1, 0, 0, 0], [1, 1, 0, 0], 2 * 0.5 * 1 / 1.5),
        ([1, 0], [1, 1], float("nan")),
        ([1, 0], [0, 0], float("nan")),
    ],
)
def test_s2(decisions: list[int], positives: list[int], expected: float) -> None:
    assert float(s2(decisions, positives)) == pytest.approx(expected, nan_ok=True)


def test_single_label_decisions_are_the_highest_logit() -> None:
    logits, labels = predictions()
    result = summarise(logits, labels, ["p"] * 60, CLASSES, multi_label=False)
    predicted = logits.argmax(axis=1)
    assert result["confusion"] == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    assert result["overall"]["accuracy"]["value"] == pytest.approx((labels == predicted).mean())
    assert result["accuracy_of"] == "samples"
    expected_s2 = []
    for index, name in enumerate(CLASSES):
        sensitivity = (predicted == index)[labels == index].mean()
        specificity = (predicted != index)[labels != index].mean()
        expected_s2.append(2 * sensitivity * specificity / (sensitivity + specificity))
        assert result["per_class"][name]["S2"]["value"] == pytest.approx(expected_s2[-1])
    assert result["overall"]["mS2"]["value"] == pytest.approx(np.mean(expected_s2))


def test_several_labels_are_decided_each_at_zero() -> None:
    logits = np.array([[3.0, 0.5], [2.0, -1.0], [-1.0, 0.1], [-2.0, -0.1]])
    labels = np.array([[1, 1], [0, 0], [0, 1], [0, 1]], dtype=np.float32)
    result = summarise(logits, labels, list("pqrs"), ["a", "b"], multi_label=True)
    assert result["confusion"] is None
    assert result["per_class"]["a"]["counts"] == {
        "true_positives": 1,
        "false_positives": 1,
        "false_negatives": 0,
        "true_negatives": 2,
    }
    assert result["per_class"]["b"]["counts"]["false_negatives"] == 1
    assert result["overall"]["accuracy"]["value"] == 6 / 8
    assert result["accuracy_of"] == "decisions"
    assert result["per_class"]["a"]["S2"]["value"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


@pytest.mark.fault("a class with no positives among the rows evaluated", "named, and in no mean")
def test_a_class_without_both_labels_is_named_and_counts_nowhere() -> None:
    logits, labels = predictions(classes=3)
    logits = np.insert(logits, 1, 9.0, axis=1)  # class b: never there, always predicted
    labels = labels + (labels >= 1)
    result = summarise(logits, labels, [str(row) for row in range(60)], CLASSES, multi_label=False)
    assert result["absent"] == ["b"]
    assert result["per_class"]["b"]["AP"] == {"value": None, "low": None, "high": None}
    assert result["per_class"]["b"]["S2"]["value"] is None
    assert "b" not in result["curves"]
    present = [result["per_class"][name]["AP"]["value"] for name in "acd"]
    assert result["overall"]["mAP"]["value"] == pytest.approx(np.mean(present))
    json.dumps(result, allow_nan=False)


def test_without_any_class_that_has_both_labels_there_is_no_mean() -> None:
    result = summarise([[1.0, 0.0]] * 6, [0] * 6, list("pqrstu"), ["a", "b"], multi_label=False)
    assert result["absent"] == ["a", "b"]
    assert result["overall"]["mAP"] == {"value": None, "low": None, "high": None}
    assert result["overall"]["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_equal_those_of_patients_drawn_one_by_one(multi_label: bool) -> None:
    """The plain way: draw patients, collect all their rows, call the functions for one set of rows."""
    logits, labels = predictions(24, 3, seed=3)
    labels[labels == 2] = 0
    labels[:4] = 2  # all of one patient, so that many resamplings have no class c
    row_patients = np.repeat(np.arange(6), 4)
    row_labels = np.eye(3, dtype=int)[labels] if multi_label else labels
    names = [f"patient {number}" for number in row_patients]
    result = summarise(logits, row_labels, names, CLASSES[:3], multi_label=multi_label, bootstrap=100, seed=5)

    draws = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=100)
    collected: dict[str, list] = {"mAP": [], "mAUC": [], "mS2": [], "accuracy": [], "AP c": []}
    for draw in draws:
        rows = np.concatenate([np.flatnonzero(row_patients == patient).repeat(n) for patient, n in enumerate(draw)])
        figures: dict[str, list] = {"mAP": [], "mAUC": [], "mS2": []}
        right = []
        for index in range(3):
            truth = labels[rows] == index
            decided = logits[rows, index] > 0 if multi_label else logits[rows].argmax(axis=1) == index
            right.append(decided == truth)
            if truth.any() and not truth.all():
                figures["mAP"].append(average_precision(logits[rows, index], truth))
                figures["mAUC"].append(roc_auc(logits[rows, index], truth))
                figures["mS2"].append(float(s2(decided, truth)))
                if index == 2:
                    collected["AP c"].append(figures["mAP"][-1])
        for name, parts in figures.items():
            collected[name].append(np.mean(parts))
        collected["accuracy"].append(np.mean(right) if multi_label else np.all(right, axis=0).mean())

    assert 0 < len(collected["AP c"]) < 100
    for name, replicates in collected.items():
        figure = result["per_class"]["c"]["AP"] if name == "AP c" else result["overall"][name]
        expected = np.percentile(replicates, [2.5, 97.5])
        np.testing.assert_allclose([figure["low"], figure["high"]], expected, atol=1e-12, err_msg=name)


def test_rows_of_one_patient_are_not_independent() -> None:
    """Every sample ten times: by patient the interval stays as wide as before, by row it would shrink."""
    logits, labels = predictions(30, 2)
    many_logits, many_labels = np.repeat(logits, 10, axis=0), np.repeat(labels, 10)
    by_patient = np.repeat(np.arange(30), 10).astype(str).tolist()
    by_row = np.arange(300).astype(str).tolist()

    def width(patients: list[str], logits: np.ndarray, labels: np.ndarray) -> float:
        figure = summarise(logits, labels, patients, ["a", "b"], multi_label=False)["overall"]["mAP"]
        return figure["high"] - figure["low"]

    once = width(np.arange(30).astype(str).tolist(), logits, labels)
    clustered = width(by_patient, many_logits, many_labels)
    assert clustered > 2 * width(by_row, many_logits, many_labels)
    assert clustered == pytest.approx(once, rel=0.25)


def test_intervals_contain_the_value_and_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = predictions()
    patients = [str(row // 2) for row in range(60)]

    def run(seed: int) -> dict:
        return summarise(logits, labels, patients, CLASSES, multi_label=False, bootstrap=300, seed=seed)

    first = run(1)
    for figure in first["overall"].values():
        assert figure["low"] < figure["value"] < figure["high"]
    assert run(1) == first
    assert run(2)["overall"]["mAP"] != first["overall"]["mAP"]
    assert values(run(2)["overall"]) == values(first["overall"])
    # A bound on memory must not change a number.
    monkeypatch.setattr(resampling, "NUMBERS_AT_ONCE", 7 * 60)
    assert run(1) == first


@pytest.mark.parametrize(("patients", "bootstrap"), [(1, 1000), (4, 1000), (20, 0)])
def test_no_intervals_for_few_patients_or_without_resampling(patients: int, bootstrap: int) -> None:
    logits, labels = predictions()
    names = [str(row % patients) for row in range(60)]
    result = summarise(logits, labels, names, CLASSES, multi_label=False, bootstrap=bootstrap)
    assert result["patients"] == patients
    figures = [*result["overall"].values(), result["per_class"]["a"]["AP"]]
    assert all(figure["value"] is not None for figure in figures)
    assert all(figure["low"] is None and figure["high"] is None for figure in figures)


def test_five_patients_are_enough_for_an_interval() -> None:
    logits, labels = predictions()
    names = [str(row % 5) for row in range(60)]
    assert summarise(logits, labels, names, CLASSES, multi_label=False)["overall"]["mAP"]["low"] is not None


def test_curves_have_the_areas_that_the_figures_say() -> None:
    logits, labels = predictions()
    result = summarise(logits, labels, ["p"] * 60, CLASSES, multi_label=False)
    for name, curves in result["curves"].items():
        roc, pr = curves["roc"], curves["pr"]
        steps = np.diff(pr["recall"]) * np.array(pr["precision"][1:])
        assert sklearn_metrics.auc(roc["fpr"], roc["tpr"]) == pytest.approx(result["per_class"][name]["AUC"]["value"])
        assert steps.sum() == pytest.approx(result["per_class"][name]["AP"]["value"])


def test_long_curves_are_thinned_to_their_shape() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 3000)
    logits = np.stack([-0.7 * labels, 0.7 * labels], axis=1) + generator.normal(size=(3000, 2))
    result = summarise(logits, labels, ["p"] * 3000, ["a", "b"], multi_label=False)
    roc, pr = result["curves"]["b"]["roc"], result["curves"]["b"]["pr"]
    assert len(roc["fpr"]) == len(roc["tpr"]) == len(pr["recall"]) == len(pr["precision"]) == 200
    assert (roc["fpr"][0], roc["tpr"][0], roc["fpr"][-1], roc["tpr"][-1]) == (0, 0, 1, 1)
    assert (pr["recall"][0], pr["recall"][-1]) == (0, 1)
    assert sklearn_metrics.auc(roc["fpr"], roc["tpr"]) == pytest.approx(roc_auc(logits[:, 1], labels), abs=5e-3)
    steps = np.diff(pr["recall"]) * np.array(pr["precision"][1:])
    assert steps.sum() == pytest.approx(average_precision(logits[:, 1], labels), abs=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [[1.0, np.nan], [0.0, 1.0], [np.inf, 0.0]]}, r"row\(s\) 0, 2 "),
        ({"logits": [[1.0], [0.0], [1.0]]}, r"2 classes\), got \(3, 1\)"),
        ({"labels": [0, 1]}, "labels must be 3 integers"),
        ({"labels": [0.0, 1.0, 1.0]}, "labels must be 3 integers.*float64"),
        ({"labels": [0, 1, 2]}, "indices from 0 to 1.*values 0, 1, 2"),
        ({"labels": [0, 1, -1]}, "indices from 0 to 1.*values -1, 0, 1"),
        ({"labels": [[0, 1], [1, 0], [0, 2]], "multi_label": True}, "labels must be 0 or 1"),
        ({"labels": [0, 1, 1], "multi_label": True}, r"labels must be 0 or 1 in shape \(3, 2\)"),
        ({"patients": ["p"]}, "3 rows, 1 names"),
        ({"classes": ["a", "a"]}, "classes must not repeat"),
        ({"bootstrap": -1}, "bootstrap must be at least 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    arguments = {
        "logits": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]],
        "labels": [0, 1, 1],
        "patients": ["p", "q", "q"],
        "classes": ["a", "b"],
        "multi_label": False,
    }
    with pytest.raises(ValueError, match=message):
        summarise(**arguments | change)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or more samples"):
        summarise(np.empty((0, 2)), np.empty(0, int), [], ["a", "b"], multi_label=False)


def two_runs(samples: int = 60, seed: int = 0, multi_label: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a better and of a worse run, which share what makes samples hard, and their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, samples)
    flags = np.eye(3, dtype=int)[labels]
    if multi_label:
        labels = flags = flags | (generator.random(flags.shape) < 0.3)
    shared = generator.normal(size=flags.shape) - 0.5 * multi_label
    better, worse = (shared + skill * flags + 0.3 * generator.normal(size=flags.shape) for skill in (1.6, 0.8))
    return better, worse, labels


@pytest.mark.parametrize("multi_label", [False, True])
def test_differences_are_those_of_both_runs_on_the_same_patients(multi_label: bool) -> None:
    """The plain way: collect the rows of each resampling, measure both runs on them, subtract."""
    better, worse, labels = two_runs(multi_label=multi_label)
    patients, classes = [f"patient {row // 4}" for row in range(60)], CLASSES[:3]
    found = paired_difference(better, worse, labels, patients, classes, multi_label=multi_label, bootstrap=40, seed=5)

    def overall(logits: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        names = [patients[row] for row in rows]
        result = summarise(logits[rows], labels[rows], names, classes, multi_label=multi_label, bootstrap=0)
        return values(result["overall"])

    every = np.arange(60)
    (weights,) = patient_weights(patients, 40, seed=5)
    resampled = [np.repeat(every, weight.astype(int)) for weight in weights]
    for name, difference in found.items():
        assert difference["value"] == pytest.approx(overall(better, every)[name] - overall(worse, every)[name])
        drawn = np.array([overall(better, rows)[name] - overall(worse, rows)[name] for rows in resampled])
        assert [difference["low"], difference["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())
        assert difference["p"] == pytest.approx(min(1, 2 * ((drawn <= 0).sum() + 1) / 41))


def test_the_other_way_round_the_difference_has_the_other_sign_and_the_same_p() -> None:
    better, worse, labels = two_runs()
    patients, settings = [str(row) for row in range(60)], {"multi_label": False, "bootstrap": 200}
    there = paired_difference(better, worse, labels, patients, CLASSES[:3], **settings)
    back = paired_difference(worse, better, labels, patients, CLASSES[:3], **settings)
    for name, difference in there.items():
        assert back[name]["value"] == -difference["value"] < 0
        assert [back[name]["low"], back[name]["high"]] == pytest.approx([-difference["high"], -difference["low"]])
        assert back[name]["p"] == difference["p"]


def test_a_run_is_no_better_than_itself() -> None:
    better, _, labels = two_runs()
    found = paired_difference(better, better, labels, [str(row) for row in range(60)], CLASSES[:3], multi_label=False)
    assert all(entry == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0} for entry in found.values())


def test_what_both_runs_find_hard_cancels_out() -> None:
    """The interval of the paired difference is narrower than that of either run."""
    better, worse, labels = two_runs(200)
    patients = [str(row) for row in range(200)]
    paired = paired_difference(better, worse, labels, patients, CLASSES[:3], multi_label=False)["mAP"]
    alone = [summarise(run, labels, patients, CLASSES[:3], multi_label=False)["overall"] for run in (better, worse)]
    widths = [run["mAP"]["high"] - run["mAP"]["low"] for run in alone]
    assert paired["high"] - paired["low"] < 0.9 * np.hypot(*widths)


def test_p_is_rarely_small_where_two_runs_are_equally_good() -> None:
    smalls = []
    for seed in range(100):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 2, 80)
        runs = [np.eye(2)[labels] + generator.normal(size=(80, 2)) for _ in range(2)]
        patients = [str(row) for row in range(80)]
        found = paired_difference(*runs, labels, patients, ["a", "b"], multi_label=False, bootstrap=200, seed=seed)
        smalls.append(found["mAP"]["p"] < 0.05)
    assert np.mean(smalls) < 0.15


@pytest.mark.parametrize(("patients", "bootstrap"), [(4, 100), (60, 0)])
def test_few_patients_or_no_resampling_give_a_difference_without_interval_and_p(patients: int, bootstrap: int) -> None:
    better, worse, labels = two_runs()
    names = [str(row % patients) for row in range(60)]
    found = paired_difference(better, worse, labels, names, CLASSES[:3], multi_label=False, bootstrap=bootstrap)
    assert all(e["value"] > 0 and e["low"] is None and e["p"] is None for e in found.values())


def test_without_both_labels_there_is_no_difference() -> None:
    found = paired_difference(
        [[1.0, 0.0]] * 6, [[0.0, 1.0]] * 6, [0] * 6, list("pqrstu"), ["a", "b"], multi_label=False
    )
    assert found["mAP"] == {"value": None, "low": None, "high": None, "p": None}
    assert found["accuracy"]["value"] == 1.0


def test_mcnemar_is_a_sign_test_on_rows_that_differ() -> None:
    right, other = np.array([1] * 9 + [0] * 2 + [1] * 50), np.array([0] * 9 + [1] * 2 + [1] * 50)
    expected = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert mcnemar(right, other) == mcnemar(other, right) == pytest.approx(expected)
    assert mcnemar(right, right) == 1.0


def test_a_difference_that_only_rounding_has_left_is_none():
    """Accuracies of three seeds that cancel: what is left has the same sign in every resampling."""
    left = np.mean(np.tile([[0.3], [-0.1], [-0.2]], 101), axis=0)
    assert left[0] != 0
    assert compared(left) == {"value": 0, "low": 0, "high": 0, "p": 1}
