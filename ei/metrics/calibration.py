"""Whether probabilities can be believed: calibration error, Brier score, log loss; and the temperature.

Calibration error is the expected calibration error (ECE) over 15 bins of equal width: how far the mean probability
of a bin is from the share of outcomes in it, on average over samples. With one label per sample it is asked of the
predicted class (top label): is it right as often as it says? With several labels it is asked of each class by
itself, and the mean taken.

It has no interval from resampling: a resampled set repeats rows, so its bins are noisier and its error is larger,
whatever the truth (simulated with 200 samples: "95 %" intervals held the true error in 0 to 61 of 100 cases).
Instead it comes with the error that a perfectly calibrated model would have had by chance, with these
probabilities and so many samples.

Shapes: N samples, C classes, W draws.

Source: Guo et al., On calibration of modern neural networks, 2017 (ECE, temperature); Bröcker and Smith, Increasing
the reliability of reliability diagrams, 2007 (outcomes drawn from the probabilities).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, softmax
from scipy.stats import binomtest

from ei.metrics.classification import Bools, checked, decided
from ei.metrics.resampling import Floats, figure, patient_weights, portions

MOST = 1e6
"""Temperatures are looked for between 1 / MOST and MOST."""
USUAL = (0.05, 20.0)
"""Beyond these a temperature has found little to calibrate."""
BINS = 15
"""Of equal width, from 0 to 1; the last one holds 1 itself."""
PREDICTED_CLASS = "predicted class"
"""What calibration is asked of where a sample has one label."""


def probabilities(logits: ArrayLike, multi_label: bool) -> Floats:
    """(N, C) -> (N, C): softmax over the classes, or a sigmoid each, computed in float64.

    >>> probabilities([[0.0, 0.0]], multi_label=False).tolist()
    [[0.5, 0.5]]
    """
    values = np.asarray(logits, float)
    return expit(values) if multi_label else softmax(values, axis=1)


def calibration_error(probs: ArrayLike, outcomes: ArrayLike) -> float:
    """Expected calibration error: ``sum_b n_b / N * |mean probability - share of outcomes|`` over the bins b.

    Args:
        probs: (N,), between 0 and 1.
        outcomes: (N,), true where what had this probability came true.

    >>> round(calibration_error([0.9, 0.9, 0.9, 0.9], [True, True, True, False]), 3)  # |0.9 - 3 / 4|
    0.15
    """
    probs, outcomes = np.asarray(probs, float), np.asarray(outcomes, bool)
    return float(_errors(probs, outcomes[None])[0])


def reliability(probs: ArrayLike, outcomes: ArrayLike) -> list[dict[str, float]]:
    """The bins that hold something: their ends, count, mean probability and share of outcomes.

    ``low`` and ``high`` are the 95 % interval of the share if samples are independent (Wilson, 1927).

    Args:
        probs: (N,), between 0 and 1.
        outcomes: (N,), true where what had this probability came true.

    >>> bins = reliability([0.95, 0.97, 0.2], [True, False, False])
    >>> [(each["count"], round(each["probability"], 2), each["share"]) for each in bins]
    [(1, 0.2, 0.0), (2, 0.96, 0.5)]
    """
    probs, outcomes = np.asarray(probs, float), np.asarray(outcomes, bool)
    bins = _bins(probs)
    return [_bin(index, probs[bins == index], outcomes[bins == index]) for index in np.unique(bins).tolist()]


def calibration(
    logits: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    multi_label: bool,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How far the probabilities of one set of predictions can be believed, ready for JSON.

    Args:
        logits: (N, C), divided by a temperature already, if there is one.
        labels: (N,) class indices, or with ``multi_label`` (N, C) of 0 and 1.
        patients: whose sample each row is, N names.
        classes: C names.
        multi_label: whether a sample may have several labels.
        bootstrap: resamplings of the patients, and draws of outcomes; 0: no intervals, nothing by chance.
        seed: of both.

    Returns:
        ``ECE`` (``value``; ``by_chance``, the mean of what perfect calibration would have given with independent
        samples, and ``by_chance_95``, below which 95 of 100 such values lie); ``Brier``, the squared distance of
        probabilities and labels, summed over classes (0 to 2), or with several labels per decision (0 to 1);
        ``log_loss``, minus the log of the true label's probability, or per decision; both as ``{"value", "low",
        "high"}`` like the figures of :func:`ei.metrics.classification.summarise`; and ``of``: for what calibration was
        asked of, its ``ECE`` and the bins of :func:`reliability`.

    Raises:
        ValueError: shapes or values that do not fit.

    >>> logits, labels, patients = [[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]], [0, 1, 1], ["p", "q", "q"]
    >>> result = calibration(logits, labels, patients, ["benign", "malignant"], multi_label=False)
    >>> round(result["ECE"]["value"], 3), result["of"]["predicted class"]["reliability"][0]["count"]
    (0.214, 3)
    """
    logits, positives = checked(logits, labels, patients, classes, multi_label)
    probs = probabilities(logits, multi_label)
    asked = _asked(probs, positives, decided(logits, multi_label), classes, multi_label)
    errors = {name: calibration_error(*pair) for name, pair in asked.items()}
    drawn = {name: _drawn_errors(asked[name][0], bootstrap, seed + number) for number, name in enumerate(asked)}
    losses = np.stack([_squared(probs, positives, multi_label), log_losses(logits, positives, multi_label)])  # (2, N)
    parts = [
        weights @ losses.T / weights.sum(axis=1)[:, None] for weights in patient_weights(patients, bootstrap, seed)
    ]
    resampled = np.concatenate(parts).T if parts else (None, None)
    brier, log_loss = (figure(float(loss.mean()), draws) for loss, draws in zip(losses, resampled, strict=True))
    return {
        "ECE": _with_chance(float(np.mean(list(errors.values()))), np.mean(list(drawn.values()), axis=0)),
        "Brier": brier,
        "log_loss": log_loss,
        "of": {
            name: {"ECE": _with_chance(errors[name], drawn[name]), "reliability": reliability(*pair)}
            for name, pair in asked.items()
        },
    }


def log_losses(logits: Floats, positives: Bools, multi_label: bool) -> Floats:
    """Minus the log of the true label's probability (N,); with several labels, the mean over a row's decisions.

    >>> log_losses(np.array([[0.0, 0.0]]), np.array([[True, False]]), multi_label=False).round(4).tolist()
    [0.6931]
    """
    if multi_label:
        # log(1 + exp(-z)) of what is there, log(1 + exp(z)) of what is not.
        return np.logaddexp(0, np.where(positives, -logits, logits)).mean(axis=1)
    return -(log_softmax(logits, axis=1) * positives).sum(axis=1)


def fit_temperature(logits: ArrayLike, labels: ArrayLike, *, multi_label: bool) -> float:
    """The T from 1 / MOST to MOST for which ``logits / T`` have the lowest log loss; 1 where there is no such T.

    There is none if no row is wrong (the loss falls for ever as T goes to 0), nor if logits are no better than
    none (it falls for ever as T grows). Otherwise the loss is convex in 1/T and has one lowest point.

    Args:
        logits: (N, C), of samples that the model was not trained on.
        labels: (N,) class indices, or with ``multi_label`` (N, C) of 0 and 1.

    Raises:
        ValueError: shapes or values that do not fit.

    Source: Guo et al., On calibration of modern neural networks, 2017, section 4.2.

    >>> logits = [[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]]  # right in 3 of 4 rows: 3 / T = log 3
    >>> round(fit_temperature(logits, [0, 0, 1, 0], multi_label=False), 3)
    2.731
    """
    count = np.shape(logits)[1] if np.ndim(logits) == 2 else 0
    names, classes = [str(row) for row in range(len(np.asarray(logits)))], [str(index) for index in range(count)]
    values, positives = checked(logits, labels, names, classes, multi_label)

    def slope(inverse: float) -> float:
        """Derivative of the mean log loss by 1/T."""
        excess = probabilities(values * inverse, multi_label) - positives
        return float((excess * values).sum(axis=1).mean())

    best = np.where(values > 0, values, 0) if multi_label else values.max(axis=1, keepdims=True) * positives
    is_some_row_wrong = bool((best - positives * values > 0).any())
    if not is_some_row_wrong or slope(0.0) >= 0:
        return 1.0
    if slope(1 / MOST) >= 0:
        return MOST
    if slope(MOST) <= 0:
        return 1 / MOST
    return 1 / float(brentq(slope, 1 / MOST, MOST, xtol=1e-12))


def doubtful_temperatures(temperatures: Mapping[str, float]) -> str:
    """A remark on those that are far from 1, by source; empty if none is.

    >>> doubtful_temperatures({"fused": 1.7, "oct": 812.0}).partition(":")[0]
    'a temperature beyond 0.05 to 20 (oct 812)'
    """
    low, high = USUAL
    far = [f"{source} {value:.3g}" for source, value in temperatures.items() if not low <= value <= high]
    if not far:
        return ""
    return (
        f"a temperature beyond {low:g} to {high:g} ({', '.join(far)}): such logits say next to nothing of the val rows,"
        " or nothing of how sure they are, so do not rely on these probabilities"
    )


def _asked(
    probs: Floats, positives: Bools, decisions: Bools, classes: Sequence[str], multi_label: bool
) -> dict[str, tuple[Floats, Bools]]:
    """What calibration is asked of: name -> probabilities (N,), and whether it came true (N,)."""
    if multi_label:
        return {name: (probs[:, index], positives[:, index]) for index, name in enumerate(classes)}
    return {PREDICTED_CLASS: (probs[decisions], positives[decisions])}


def _bins(probs: Floats) -> NDArray[np.intp]:
    return np.minimum((probs * BINS).astype(np.intp), BINS - 1)


def _bin(index: int, probs: Floats, outcomes: Bools) -> dict[str, float]:
    low, high = binomtest(int(outcomes.sum()), len(outcomes)).proportion_ci(method="wilson")
    return {
        "start": index / BINS,
        "end": (index + 1) / BINS,
        "count": len(outcomes),
        "probability": float(probs.mean()),
        "share": float(outcomes.mean()),
        "low": float(low),
        "high": float(high),
    }


def _errors(probs: Floats, outcomes: Bools) -> Floats:
    """Calibration error of W sets of outcomes (W, N) for one set of probabilities (N,)."""
    in_bin = (_bins(probs)[:, None] == np.arange(BINS)).astype(float)  # (N, 15)
    return np.abs((probs - outcomes) @ in_bin).sum(axis=1) / len(probs)


def _drawn_errors(probs: Floats, draws: int, seed: int) -> Floats:
    """Calibration errors (W,) of outcomes that come true exactly as often as the probabilities say."""
    generator = np.random.default_rng(seed)
    parts = [_errors(probs, generator.random((size, len(probs))) < probs) for size in portions(draws, len(probs))]
    return np.concatenate([np.empty(0), *parts])


def _with_chance(value: float, drawn: Floats) -> dict[str, float | None]:
    chance = (float(drawn.mean()), float(np.percentile(drawn, 95))) if len(drawn) else (None, None)
    return {"value": value, "by_chance": chance[0], "by_chance_95": chance[1]}


def _squared(probs: Floats, positives: Bools, multi_label: bool) -> Floats:
    distances = (probs - positives) ** 2
    return distances.mean(axis=1) if multi_label else distances.sum(axis=1)
