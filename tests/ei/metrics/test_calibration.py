"""Calibration against torchmetrics and scikit-learn, and the temperature against what it must undo."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional import classification as torchmetrics_functional

from ei.metrics import resampling
from ei.metrics.calibration import (
    calibration,
    calibration_error,
    doubtful_temperatures,
    fit_temperature,
    log_losses,
    probabilities,
    reliability,
)
from ei.metrics.resampling import patient_weights

CLASSES = ["a", "b", "c", "d"]


def calibrated(samples: int, classes: int = 4, seed: int = 0, multi_label: bool = False) -> tuple[np.ndarray, ...]:
    """Logits (N, C), and labels that come true exactly as often as the logits say."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, size=(samples, classes))
    probs = probabilities(logits, multi_label)
    if multi_label:
        return logits, (generator.random(probs.shape) < probs).astype(int)
    return logits, (generator.random((samples, 1)) > probs.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)


def mean_loss(logits: np.ndarray, labels: np.ndarray, multi_label: bool) -> float:
    positives = labels.astype(bool) if multi_label else np.eye(logits.shape[1], dtype=bool)[labels]
    return float(log_losses(logits, positives, multi_label).mean())


def test_probabilities() -> None:
    logits = np.array([[0.0, np.log(3.0)]], dtype=np.float32)
    np.testing.assert_allclose(probabilities(logits, multi_label=False), [[0.25, 0.75]])
    np.testing.assert_allclose(probabilities(logits, multi_label=True), [[0.5, 0.75]])


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_error_of_the_predicted_class_equals_torchmetrics(scale: float) -> None:
    logits, labels = calibrated(300)
    result = calibration(scale * logits, labels, ["p"] * 300, CLASSES, multi_label=False)
    probs = torch.tensor(probabilities(scale * logits, False))
    expected = torchmetrics_functional.multiclass_calibration_error(probs, torch.tensor(labels), 4, n_bins=15)
    assert result["ECE"]["value"] == pytest.approx(float(expected), abs=1e-5)
    assert list(result["of"]) == ["predicted class"]


def test_the_errors_of_several_labels_equal_torchmetrics_class_by_class() -> None:
    logits, labels = calibrated(300, multi_label=True)
    result = calibration(2 * logits, labels, ["p"] * 300, CLASSES, multi_label=True)
    probs = probabilities(2 * logits, True)
    expected = [
        float(
            torchmetrics_functional.binary_calibration_error(
                torch.tensor(probs[:, index]), torch.tensor(labels[:, index]), n_bins=15
            )
        )
        for index in range(4)
    ]
    found = [result["of"][name]["ECE"]["value"] for name in CLASSES]
    assert found == pytest.approx(expected, abs=1e-5)
    assert result["ECE"]["value"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_log_loss_and_brier_score_equal_scikit_learn() -> None:
    logits, labels = calibrated(200)
    result, probs = calibration(logits, labels, ["p"] * 200, CLASSES, multi_label=False), probabilities(logits, False)
    assert result["log_loss"]["value"] == pytest.approx(sklearn_metrics.log_loss(labels, probs))
    assert result["Brier"]["value"] == pytest.approx(((probs - np.eye(4)[labels]) ** 2).sum(axis=1).mean())
    logits, labels = calibrated(200, multi_label=True)
    result, probs = calibration(logits, labels, ["p"] * 200, CLASSES, multi_label=True), probabilities(logits, True)
    columns = [(labels[:, index], probs[:, index]) for index in range(4)]
    losses = [sklearn_metrics.log_loss(*column) for column in columns]
    scores = [sklearn_metrics.brier_score_loss(*column) for column in columns]
    assert result["log_loss"]["value"] == pytest.approx(np.mean(losses))
    assert result["Brier"]["value"] == pytest.approx(np.mean(scores))


def test_logits_of_any_size_have_a_finite_loss() -> None:
    assert mean_loss(np.array([[900.0, -900.0]]), np.array([1]), False) == 1800
    assert mean_loss(np.array([[900.0, -900.0]]), np.array([[0, 1]]), True) == 900


def test_the_bins_add_up_to_the_error() -> None:
    logits, labels = calibrated(500)
    probs = probabilities(3 * logits, False).max(axis=1)
    outcomes = probabilities(logits, False).argmax(axis=1) == labels
    bins = reliability(probs, outcomes)
    assert sum(each["count"] for each in bins) == 500
    gaps = [each["count"] * abs(each["share"] - each["probability"]) for each in bins]
    assert sum(gaps) / 500 == pytest.approx(calibration_error(probs, outcomes))
    for each in bins:
        assert each["start"] <= each["probability"] <= each["end"]
        assert 0 <= each["low"] <= each["share"] + 1e-12 and each["share"] <= each["high"] + 1e-12 <= 1 + 1e-12


@pytest.mark.parametrize(("prob", "bin_end"), [(0.0, 1 / 15), (1.0, 1.0), (0.5, 8 / 15)])
def test_the_ends_of_the_range_have_a_bin(prob: float, bin_end: float) -> None:
    (found,) = reliability([prob], [True])
    assert found["end"] == pytest.approx(bin_end)
    assert calibration_error([prob], [True]) == pytest.approx(1 - prob)


def test_what_perfect_calibration_gives_by_chance() -> None:
    """Of 100 calibrated sets about 95 lie below the limit; one that is too sure lies above it."""
    results = [
        calibration(*calibrated(200, seed=seed), ["p"] * 200, CLASSES, multi_label=False, bootstrap=200)["ECE"]
        for seed in range(100)
    ]
    below = np.mean([each["value"] <= each["by_chance_95"] for each in results])
    assert 0.88 <= below <= 1
    assert np.mean([each["value"] for each in results]) == pytest.approx(
        np.mean([each["by_chance"] for each in results]), rel=0.1
    )
    logits, labels = calibrated(200)
    too_sure = calibration(4 * logits, labels, ["p"] * 200, CLASSES, multi_label=False)["ECE"]
    assert too_sure["value"] > 2 * too_sure["by_chance_95"]


def test_why_the_error_has_no_interval_from_resampling() -> None:
    """Resampled errors are larger than the error itself, which is too large already: here the truth is 0."""
    logits, labels = calibrated(200)
    probs = probabilities(logits, False)
    top, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    (weights,) = patient_weights([str(row) for row in range(200)], 200, seed=0)
    repeated = [calibration_error(np.repeat(top, w.astype(int)), np.repeat(right, w.astype(int))) for w in weights]
    assert np.mean(repeated) > calibration_error(top, right) > 0
    assert np.percentile(repeated, 2.5) > 0


@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_are_those_of_resampled_patients(multi_label: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = calibrated(60, multi_label=multi_label)
    patients = [f"patient {row // 3}" for row in range(60)]
    result = calibration(logits, labels, patients, CLASSES, multi_label=multi_label, bootstrap=100, seed=5)
    (weights,) = patient_weights(patients, 100, seed=5)
    expected = [
        mean_loss(np.repeat(logits, w.astype(int), axis=0), np.repeat(labels, w.astype(int), axis=0), multi_label)
        for w in weights
    ]
    assert [result["log_loss"]["low"], result["log_loss"]["high"]] == pytest.approx(
        np.percentile(expected, [2.5, 97.5]).tolist()
    )
    # A bound on memory changes no number, but for its last bits.
    monkeypatch.setattr(resampling, "NUMBERS_AT_ONCE", 7 * 60)
    again = calibration(logits, labels, patients, CLASSES, multi_label=multi_label, bootstrap=100, seed=5)
    for figure in ("ECE", "Brier", "log_loss"):
        assert again[figure] == pytest.approx(result[figure], rel=1e-12)


@pytest.mark.parametrize(("patients", "bootstrap"), [(4, 100), (20, 0)])
def test_without_resampling_there_are_values_only(patients: int, bootstrap: int) -> None:
    logits, labels = calibrated(60)
    names = [str(row % patients) for row in range(60)]
    result = calibration(logits, labels, names, CLASSES, multi_label=False, bootstrap=bootstrap)
    assert result["Brier"]["value"] is not None and result["Brier"]["low"] is None
    assert (result["ECE"]["by_chance"] is None) == (bootstrap == 0)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_a_known_temperature_is_found(temperature: float, multi_label: bool) -> None:
    logits, labels = calibrated(20_000, multi_label=multi_label)
    assert fit_temperature(temperature * logits, labels, multi_label=multi_label) == pytest.approx(
        temperature, rel=0.05
    )


@pytest.mark.parametrize("multi_label", [False, True])
def test_multiplied_logits_have_a_multiplied_temperature(multi_label: bool) -> None:
    logits, labels = calibrated(200, multi_label=multi_label)
    once = fit_temperature(logits, labels, multi_label=multi_label)
    for factor in (1e-3, 0.5, 30.0):
        found = fit_temperature(factor * logits, labels, multi_label=multi_label)
        assert found == pytest.approx(factor * once, rel=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.1, 20), st.booleans())
@settings(max_examples=80)
def test_no_other_temperature_has_a_lower_loss(seed: int, samples: int, scale: float, multi_label: bool) -> None:
    generator = np.random.default_rng(seed)
    logits = scale * generator.normal(size=(samples, 3))
    labels = generator.integers(0, 2, (samples, 3)) if multi_label else generator.integers(0, 3, samples)
    temperature = fit_temperature(logits, labels, multi_label=multi_label)
    loss = mean_loss(logits / temperature, labels, multi_label)
    assert temperature > 0
    assert loss <= mean_loss(logits, labels, multi_label) + 1e-9
    if temperature != 1:
        others = [mean_loss(logits / (temperature * factor), labels, multi_label) for factor in (0.5, 0.97, 1.03, 2)]
        assert loss <= min(others) + 1e-9


@pytest.mark.parametrize(
    ("logits", "labels", "multi_label"),
    [
        ([[2.0, 1.0], [0.0, 3.0]], [0, 1], False),  # all right: the loss falls for ever as T goes to 0
        ([[2.0, 1.0], [0.0, 3.0]], [1, 0], False),  # all wrong: it falls for ever as T grows
        ([[1.0, 1.0], [0.0, 3.0]], [0, 1], False),  # right but for a tie, which no T can part
        ([[0.0, 0.0]], [0], False),
        ([[2.0, -1.0], [-2.0, 3.0]], [[1, 0], [0, 1]], True),
        ([[-2.0, 1.0]], [[1, 0]], True),
    ],
)
def test_where_no_temperature_is_the_best_one_is_taken(logits: list, labels: list, multi_label: bool) -> None:
    assert fit_temperature(logits, labels, multi_label=multi_label) == 1.0


def test_one_barely_wrong_row_is_enough_and_is_no_endless_search() -> None:
    logits = [[5.0, 0.0]] * 50 + [[1e-6, 0.0]]
    temperature = fit_temperature(logits, [0] * 50 + [1], multi_label=False)
    assert 0 < temperature < 0.5


@pytest.mark.fault("logits that know nothing, or are next to zero", "a temperature at its bound, finite")
@pytest.mark.parametrize(("size", "right", "wrong", "expected"), [(1e-9, 50, 1, 1e-6), (1e3, 10_001, 10_000, 1e6)])
def test_a_temperature_ends_at_its_bound(size: float, right: int, wrong: int, expected: float) -> None:
    rows = size * np.repeat([1.0, -1.0], [right, wrong])
    logits = np.stack([rows, np.zeros(len(rows))], axis=1)
    temperature = fit_temperature(logits, [0] * len(rows), multi_label=False)
    assert temperature == pytest.approx(expected)
    largest = np.finfo(np.float32).max
    assert np.isfinite(probabilities(np.array([[largest, -largest]], float) / temperature, multi_label=False)).all()


@pytest.mark.parametrize("value", [0.04, 21.0, 1e6])
def test_a_temperature_far_from_1_is_remarked_on(value: float) -> None:
    remark = doubtful_temperatures({"fused": 1.0, "oct": value, "cfp": 20.0})
    assert f"(oct {value:.3g})" in remark
    assert not doubtful_temperatures({"fused": 0.05, "oct": 1.0})


def test_a_temperature_needs_logits_and_labels_that_fit() -> None:
    with pytest.raises(ValueError, match="labels must be 2 integers"):
        fit_temperature([[1.0, 0.0], [0.0, 1.0]], [0], multi_label=False)
    with pytest.raises(ValueError, match="logits must be"):
        fit_temperature([1.0, 0.0], [0, 1], multi_label=False)
