"""How good predictions are: pure functions on arrays of logits and labels.

Per class, one class against the rest, on raw logits: a softmax ranks the samples of a class differently,
and a sigmoid saturates and makes ties. Means are over the classes that have both labels; a class that
lacks one has no figure, never a zero. Values are scikit-learn's; intervals come from resampling patients.
Whether probabilities can be believed is asked in :mod:`ei.metrics.calibration`.

Shapes: N samples, C classes, W weightings of the samples (one per resampling).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from ei.metrics.resampling import Floats, figure, patient_weights

Bools = NDArray[np.bool_]

OVERALL = ("mAP", "mAUC", "mS2", "accuracy")
ROUNDING = 1e-12
"""Figures that differ by less are equal."""
CURVE_POINTS = 200
"""A curve is thinned to at most this many points."""


def average_precision(logits: ArrayLike, positives: ArrayLike) -> float:
    """Mean of the precision over the positives, from the highest logit down; nan without both labels.

    ``AP = sum_k (recall_k - recall_{k-1}) * precision_k`` over the distinct logits; ties are one step.

    Args:
        logits: (N,).
        positives: (N,), true for samples of the class.

    Source: arXiv 2603.17514, section 4.

    >>> average_precision([3.0, 2.0, 1.0], [True, False, True])  # (1/1 + 2/3) / 2
    0.8333333333333333
    """
    logits, positives = _one_class(logits, positives)
    return float(average_precision_score(positives, logits)) if _has_both(positives) else float("nan")


def roc_auc(logits: ArrayLike, positives: ArrayLike) -> float:
    """Chance that a positive has a higher logit than a negative, ties counting half; nan without both labels.

    Args:
        logits: (N,).
        positives: (N,), true for samples of the class.

    Source: arXiv 2603.17514, section 4.

    >>> roc_auc([3.0, 2.0, 1.0], [True, False, True])
    0.5
    """
    logits, positives = _one_class(logits, positives)
    return float(roc_auc_score(positives, logits)) if _has_both(positives) else float("nan")


def s2(decisions: ArrayLike, positives: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Harmonic mean of sensitivity and specificity; 0 where both are 0, nan where a label is missing.

    ``S2 = 2 Se Sp / (Se + Sp)``

    Args:
        decisions: (N, ...), true where the class is predicted.
        positives: (N, ...), true where it is there.
        weights: (W, N), how often each sample counts; None: once.

    Returns:
        (...), or (W, ...) with weights.

    Source: arXiv 2603.17514, section 4.

    >>> float(s2([True, False, True, False], [True, True, False, False]))  # Se = Sp = 1/2
    0.5
    """
    decisions, positives = np.asarray(decisions, bool), np.asarray(positives, bool)
    counts = np.ones(len(positives)) if weights is None else np.asarray(weights, float)
    with np.errstate(invalid="ignore"):
        sensitivity = _total(counts, decisions & positives) / _total(counts, positives)
        specificity = _total(counts, ~decisions & ~positives) / _total(counts, ~positives)
        both = sensitivity + specificity
        return np.where(both == 0, 0.0, 2 * sensitivity * specificity / both)


def weighted_ap_and_auc(logits: ArrayLike, positives: ArrayLike, weights: ArrayLike) -> tuple[Floats, Floats]:
    """AP and AUC of one class under many weightings at once, sorted once; nan where a label has no weight.

    Equals :func:`average_precision` and :func:`roc_auc` of the rows repeated ``weights`` times.

    Args:
        logits: (N,).
        positives: (N,), true for samples of the class.
        weights: (W, N), how often each sample counts.

    Returns:
        AP (W,) and AUC (W,).

    >>> ap, auc = weighted_ap_and_auc([3.0, 2.0, 1.0], [True, False, True], [[1, 1, 1], [2, 1, 0]])
    >>> ap.round(4).tolist(), auc.tolist()
    ([0.8333, 1.0], [0.5, 1.0])
    """
    logits, positives = _one_class(logits, positives)
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    # Equal logits cannot be told apart: they are one step of the curve, at the last of them.
    steps = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    counts = np.asarray(weights, float)[:, order]
    hits = np.cumsum(counts * positives[order], axis=1)[:, steps]  # (W, steps)
    alarms = np.cumsum(counts * ~positives[order], axis=1)[:, steps]
    new_hits, new_alarms = np.diff(hits, prepend=0.0), np.diff(alarms, prepend=0.0)
    with np.errstate(invalid="ignore"):
        precision = np.where(new_hits > 0, hits / (hits + alarms), 0.0)
        ap = (new_hits * precision).sum(axis=1) / hits[:, -1]
        auc = (new_alarms * (hits - new_hits / 2)).sum(axis=1) / (hits[:, -1] * alarms[:, -1])
    return np.where(np.isnan(auc), np.nan, ap), auc


def summarise(
    logits: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    multi_label: bool,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of one set of predictions, ready for JSON (None where a figure does not exist).

    A class is predicted where its logit is the highest of the sample, or, with several labels per
    sample, above 0 (sigmoid > 0.5). ``accuracy`` is the share of samples whose class is predicted, or,
    with several labels, the share of the N * C yes/no decisions that are right; ``accuracy_of`` says
    which ("samples" or "decisions").

    Each figure is ``{"value", "low", "high"}``: the 95 % interval is the 2.5th to 97.5th percentile over
    resamplings of the *patients*, with all their rows, because the rows of a patient are not independent.
    A resampling in which a class lacks a label counts neither for the class nor, for that class, in the
    means. Fewer than 5 patients, or ``bootstrap=0``: no intervals.

    Args:
        logits: (N, C).
        labels: (N,) class indices, or with ``multi_label`` (N, C) of 0 and 1.
        patients: whose sample each row is, N names.
        classes: C names.
        multi_label: whether a sample may have several labels.
        bootstrap: resamplings for the intervals; 0: none.
        seed: of the resampling.

    Returns:
        ``samples``, ``patients``, ``overall`` (mAP, mAUC, mS2, accuracy), ``accuracy_of``, ``per_class``
        (positives, AP, AUC, S2, and counts of its decisions), ``absent`` (classes without both labels, left
        out of the means), ``confusion`` (rows true, columns predicted; None with several labels) and
        ``curves`` (ROC and precision-recall of each class that has both labels).

    Raises:
        ValueError: shapes or values that do not fit, or logits that are not finite (it names the rows).

    Source: arXiv 2603.17514, section 4.

    >>> logits, labels, patients = [[2.0, 0.0], [0.0, 1.0], [1.0, 0.5]], [0, 1, 1], ["p", "q", "q"]
    >>> result = summarise(logits, labels, patients, ["benign", "malignant"], multi_label=False)
    >>> result["overall"]["mAUC"], result["confusion"]
    ({'value': 1.0, 'low': None, 'high': None}, [[1, 0], [1, 1]])
    """
    logits, positives = checked(logits, labels, patients, classes, multi_label)
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be at least 0, got {bootstrap}")
    decisions = decided(logits, multi_label)

    values = _values(logits, positives, decisions, multi_label)
    parts = [
        _resampled(logits, positives, decisions, multi_label, weights)
        for weights in patient_weights(patients, bootstrap, seed)
    ]
    resampled = {name: np.concatenate([part[name] for part in parts]) for name in values} if parts else {}
    figures = {name: _figures(value, resampled.get(name)) for name, value in values.items()}

    present = [index for index in range(len(classes)) if _has_both(positives[:, index])]
    return {
        "samples": len(logits),
        "patients": len(set(patients)),
        "overall": {
            "mAP": _mean_figure(values["AP"], resampled.get("AP")),
            "mAUC": _mean_figure(values["AUC"], resampled.get("AUC")),
            "mS2": _mean_figure(values["S2"], resampled.get("S2")),
            "accuracy": figures["accuracy"][0],
        },
        "accuracy_of": "decisions" if multi_label else "samples",
        "per_class": {
            name: {
                "positives": int(positives[:, index].sum()),
                **{figure: figures[figure][index] for figure in ("AP", "AUC", "S2")},
                "counts": _decision_counts(decisions[:, index], positives[:, index]),
            }
            for index, name in enumerate(classes)
        },
        "absent": [name for index, name in enumerate(classes) if index not in present],
        "confusion": None if multi_label else (positives.T.astype(int) @ decisions.astype(int)).tolist(),
        "curves": {classes[index]: _curves(logits[:, index], positives[:, index]) for index in present},
    }


def paired_difference(
    logits: ArrayLike,
    other: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    multi_label: bool,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """How much better one set of predictions is than another of the same rows: mAP, mAUC, mS2 and accuracy.

    Both are measured on the same resampled patients, so what makes patients hard for both cancels out; the
    interval of the difference is narrower than those of the two figures suggest.

    ``p`` is twice the share of resamplings in which the difference is zero or has the other sign than ``value``
    (counted as one more than there were, of one resampling more, so it is never 0; at most 1). It is read off the
    same resamplings as the interval, and is as approximate: not an exact test, and blind to what another training
    run would have given.

    Args:
        logits: (N, C).
        other: (N, C), what the difference is taken from: positive values say that ``logits`` are better.
        labels: (N,) class indices, or with ``multi_label`` (N, C) of 0 and 1.
        patients: whose sample each row is, N names.
        classes: C names.
        multi_label: whether a sample may have several labels.
        bootstrap: resamplings; 0, or fewer than 5 patients: no interval and no p.
        seed: of the resampling.

    Returns:
        Per measure ``value``, ``low``, ``high``, ``p``; None where one does not exist.

    Raises:
        ValueError: shapes or values that do not fit.

    >>> good, bad = [[1, 0], [0, 1], [0, 1], [1, 0]], [[1, 0], [0, 1], [1, 0], [1, 0]]
    >>> paired_difference(good, bad, [0, 1, 1, 0], list("pqrs"), ["a", "b"], multi_label=False)["accuracy"]
    {'value': 0.25, 'low': None, 'high': None, 'p': None}
    """
    ours, theirs = (
        resampled_figures(values, labels, patients, classes, multi_label=multi_label, bootstrap=bootstrap, seed=seed)
        for values in (logits, other)
    )
    return {name: compared(ours[name] - theirs[name]) for name in OVERALL}


def resampled_figures(
    logits: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    multi_label: bool,
    bootstrap: int,
    seed: int,
) -> dict[str, Floats]:
    """Figures as they are, and in each resampling of the patients: what is made of several sets of predictions can be
    resampled as one, since the same seed draws the same patients. Arguments are those of :func:`summarise`.

    Returns:
        mAP, mAUC, mS2 and accuracy (1 + W,), AP (1 + W, C): the figure, then that of each resampling; nan where it is
        undefined. W is 0 with fewer than 5 patients.

    >>> values = resampled_figures([[1, 0], [0, 1]], [0, 1], ["p", "q"], "ab", multi_label=False, bootstrap=9, seed=0)
    >>> values["mAP"].tolist(), values["AP"].tolist()
    ([1.0], [[1.0, 1.0]])
    """
    values, positives = checked(logits, labels, patients, classes, multi_label)
    case = (values, positives, decided(values, multi_label), multi_label)
    as_it_is = {name: value.reshape(1, -1) for name, value in _values(*case).items()}
    parts = [as_it_is, *(_resampled(*case, weights) for weights in patient_weights(patients, bootstrap, seed))]
    figures = {name: np.concatenate([part[name] for part in parts]) for name in as_it_is}
    return _means(figures) | {"AP": figures["AP"]}


def compared(differences: Floats) -> dict[str, float | None]:
    """A difference of what :func:`resampled_figures` gives (1 + W,): ``value``, ``low``, ``high``, and ``p``."""
    # What is left of a mean over seeds that cancel has a sign, and means nothing.
    differences = np.where(np.abs(differences) < ROUNDING, 0.0, differences)
    value, others = differences[0], differences[1:]
    return figure(value, others) | {"p": _sign_p(value, others)}


def mcnemar(right: ArrayLike, other_right: ArrayLike) -> float:
    """Exact McNemar test: the chance that rows which only one of two got right fall so unequally, were both as good.

    Only for rows that are independent, such as one per patient.

    Args:
        right: (N,), true where the one is right.
        other_right: (N,), true where the other is.

    Source: McNemar, Psychometrika 1947; the exact form is a two-sided sign test.

    >>> mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])  # 2 / 2^5
    0.0625
    """
    right, other_right = np.asarray(right, bool), np.asarray(other_right, bool)
    only, only_other = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    return float(binomtest(only, only + only_other).pvalue) if only + only_other else 1.0


def checked(
    logits: ArrayLike, labels: ArrayLike, patients: Sequence[str], classes: Sequence[str], multi_label: bool
) -> tuple[Floats, Bools]:
    """Logits (N, C) in double precision, and the labels as (N, C) true / false; a ValueError if they do not fit."""
    logits, labels = np.asarray(logits, float), np.asarray(labels)
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes must not repeat a name, got {list(classes)}")
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] != len(classes):
        raise ValueError(f"logits must be (1 or more samples, {len(classes)} classes), got {logits.shape}")
    if len(patients) != len(logits):
        raise ValueError(f"patients must name one patient per row: {len(logits)} rows, {len(patients)} names")
    unusable = np.flatnonzero(~np.isfinite(logits).all(axis=1)).tolist()
    if unusable:
        more = f" and {len(unusable) - 20} more" if len(unusable) > 20 else ""
        named = ", ".join(map(str, unusable[:20])) + more
        raise ValueError(f"logits must be finite, got inf or nan in row(s) {named} (counted from 0)")
    if multi_label:
        if labels.shape != logits.shape or not np.isin(labels, (0, 1)).all():
            raise ValueError(f"labels must be 0 or 1 in shape {logits.shape}, got {_described(labels)}")
        return logits, labels.astype(bool)
    if labels.shape != logits.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be {len(logits)} integers, got {_described(labels)}")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels must be indices from 0 to {len(classes) - 1}, got {_described(labels)}")
    return logits, np.eye(len(classes), dtype=bool)[labels]


def decided(logits: Floats, multi_label: bool) -> Bools:
    """Which classes are predicted (N, C): those above 0, or the highest of each sample."""
    return logits > 0 if multi_label else np.eye(logits.shape[1], dtype=bool)[logits.argmax(axis=1)]


def _described(labels: NDArray[Any]) -> str:
    values = np.unique(labels)
    shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    return f"shape {labels.shape} of {labels.dtype} with values {shown}"


def _one_class(logits: ArrayLike, positives: ArrayLike) -> tuple[Floats, Bools]:
    return np.asarray(logits, float), np.asarray(positives, bool)


def _has_both(positives: Bools) -> bool:
    return bool(positives.any() and not positives.all())


def _total(weights: Floats, marks: Bools) -> Floats:
    return np.asarray(weights @ marks.astype(float))


def _values(logits: Floats, positives: Bools, decisions: Bools, multi_label: bool) -> dict[str, Floats]:
    """AP, AUC and S2 (C,), accuracy (1,)."""
    columns = list(zip(logits.T, positives.T, strict=True))
    return {
        "AP": np.array([average_precision(*column) for column in columns]),
        "AUC": np.array([roc_auc(*column) for column in columns]),
        "S2": s2(decisions, positives),
        "accuracy": _right(decisions, positives, multi_label).mean(keepdims=True),
    }


def _resampled(
    logits: Floats, positives: Bools, decisions: Bools, multi_label: bool, weights: Floats
) -> dict[str, Floats]:
    """AP, AUC and S2 (W, C), accuracy (W, 1)."""
    pairs = [weighted_ap_and_auc(*column, weights) for column in zip(logits.T, positives.T, strict=True)]
    accuracy = weights @ _right(decisions, positives, multi_label) / weights.sum(axis=1)
    return {
        "AP": np.stack([ap for ap, _ in pairs], axis=1),
        "AUC": np.stack([auc for _, auc in pairs], axis=1),
        "S2": s2(decisions, positives, weights),
        "accuracy": accuracy[:, None],
    }


def _right(decisions: Bools, positives: Bools, multi_label: bool) -> Floats:
    """Share of each row that is right (N,): of its C decisions, or of its one class (0 or 1)."""
    agree = decisions == positives
    return agree.mean(axis=1) if multi_label else agree.all(axis=1).astype(float)


def _means(values: dict[str, Floats]) -> dict[str, Floats]:
    """The overall figures (W,) of AP, AUC and S2 (W, C) or (C,) and accuracy."""
    means = {f"m{name}": _defined_mean(np.atleast_2d(values[name])) for name in ("AP", "AUC", "S2")}
    return means | {"accuracy": values["accuracy"].reshape(-1)}


def _sign_p(value: float, resampled: Floats) -> float | None:
    """See :func:`paired_difference`."""
    defined = resampled[~np.isnan(resampled)]
    if np.isnan(value) or not len(defined):
        return None
    against = int((defined * np.sign(value) <= 0).sum())
    return min(1.0, 2 * (against + 1) / (len(defined) + 1))


def _figures(values: Floats, resampled: Floats | None) -> list[dict[str, float | None]]:
    columns = [None] * len(values) if resampled is None else list(resampled.T)
    return [figure(value, column) for value, column in zip(values, columns, strict=True)]


def _mean_figure(values: Floats, resampled: Floats | None) -> dict[str, float | None]:
    mean = _defined_mean(values[None])[0]
    return figure(mean, None if resampled is None else _defined_mean(resampled))


def _defined_mean(values: Floats) -> Floats:
    """Mean of each row (W, C) -> (W,) over its entries that are not nan; nan where there are none."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=1) / (~np.isnan(values)).sum(axis=1)


def _decision_counts(decisions: Bools, positives: Bools) -> dict[str, int]:
    return {
        "true_positives": int((decisions & positives).sum()),
        "false_positives": int((decisions & ~positives).sum()),
        "false_negatives": int((~decisions & positives).sum()),
        "true_negatives": int((~decisions & ~positives).sum()),
    }


def _curves(logits: Floats, positives: Bools) -> dict[str, dict[str, list[float]]]:
    fpr, tpr, _ = roc_curve(positives, logits)
    precision, recall, _ = (points[::-1] for points in precision_recall_curve(positives, logits))
    # The first point of each recall: steps back from them have the area AP.
    gains = np.diff(recall, prepend=-1) > 0
    return {
        "roc": {"fpr": _thinned(fpr), "tpr": _thinned(tpr)},
        "pr": {"recall": _thinned(recall[gains]), "precision": _thinned(precision[gains])},
    }


def _thinned(points: Floats) -> list[float]:
    """At most CURVE_POINTS of them, evenly spaced, with both ends."""
    kept = np.linspace(0, len(points) - 1, min(CURVE_POINTS, len(points))).round().astype(int)
    return [float(point) for point in points[kept]]
