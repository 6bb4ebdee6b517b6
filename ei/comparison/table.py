"""The table of a comparison: a row per method, from the logits and notes of its cells. Reads files; imports no torch.

Of several seeds a figure is the mean. Its interval is that of the mean, from resampling the patients of the evaluated
rows: the same patients for every seed and every method, so it says how the mean would differ on other patients, and
nothing of other seeds; those show in the standard deviation beside it. The difference to the first method is taken on
the same resampled patients, averaged over the seeds that both have.

Of several folds, the rows of all are put together and measured as one set, each with the logits of the model that had
not seen them. AP and AUC then also rank samples of one model against those of another, whose logits may lie higher; the
figures of each cell by itself are listed under "cells".

Shapes: N samples, C classes, S sources, W resamplings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ei.metrics.classification import OVERALL, compared, resampled_figures
from ei.metrics.resampling import Floats, figure
from ei.report.against import require_same_samples
from ei.runs.stored_logits import StoredLogits

COSTS = ("seconds", "images_per_second", "memory_gib", "epochs")


@dataclass(frozen=True)
class Result:
    """What a finished cell has predicted for the rows of one split, and what its training took."""

    method: str
    seed: int
    fold: str
    logits: StoredLogits
    cost: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """A cell without a result."""

    method: str
    seed: int
    fold: str
    reason: str


def tabulate(
    results: Sequence[Result],
    failures: Sequence[Failure],
    parameters: Mapping[str, int],
    *,
    folds: Sequence[str],
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that the files of a comparison show, ready for JSON (None where a figure does not exist).

    Args:
        results: Of the finished cells, all on the same rows.
        failures: The other cells.
        parameters: Trained ones of each method; its order is that of the rows, and the first is what the others are
            compared with.
        folds: All of them; a seed counts for a method once it has them all.
        bootstrap: Resamplings of the patients; 0: no intervals.
        seed: Of the resampling.

    Returns:
        ``classes``, ``multi_label``, ``samples``, ``patients``, ``reference``, ``methods``, ``cells``. A method has
        ``name``, ``parameters``, ``seeds``, ``sources`` ("fused" and the modalities of which it has predictions of
        their own: ``samples``, ``measures`` and ``per_class`` with value, low, high and sd, ``difference`` with value,
        low, high and p), ``cost`` and ``failed``.

    Raises:
        ValueError: no cell is finished, or they were not evaluated on the same samples.
    """
    if not results:
        raise ValueError("no cell of the comparison is finished, so there is nothing to tabulate")
    pooled = {
        (name, number): _pooled(parts)
        for name in parameters
        for number in sorted({result.seed for result in results})
        if (parts := _all_folds(results, name, number, folds))
    }
    _require_same([(result.fold, f"{result.method}, seed {result.seed}", result.logits) for result in results])
    first = results[0].logits
    classes, multi_label = first.classes.tolist(), first.labels.ndim == 2
    settings = {"multi_label": multi_label, "bootstrap": bootstrap, "seed": seed}
    figures = {key: _figures(stored, settings) for key, stored in pooled.items()}
    reference = next(iter(parameters))
    samples = next(iter(pooled.values()), first)
    return {
        "classes": classes,
        "multi_label": multi_label,
        "samples": len(samples.ids),
        "patients": len(set(samples.patients.tolist())),
        "reference": reference,
        "methods": [
            {
                "name": name,
                "parameters": count,
                **_row(_of_method(figures, name), {} if name == reference else _of_method(figures, reference), classes),
                "cost": _cost([each for each in results if each.method == name and (name, each.seed) in pooled]),
                "failed": [
                    {"seed": each.seed, "fold": each.fold, "reason": each.reason}
                    for each in failures
                    if each.method == name
                ],
            }
            for name, count in parameters.items()
        ],
        "cells": [_cell(result, settings) for result in results],
    }


@dataclass(frozen=True)
class _Measured:
    """A source's figures with their resamplings, and on which rows."""

    rows: np.ndarray
    figures: dict[str, Floats]


def _all_folds(results: Sequence[Result], method: str, seed: int, folds: Sequence[str]) -> list[StoredLogits]:
    """The logits of a method with one seed, in the order of the folds; nothing if there is one without."""
    those = {result.fold: result.logits for result in results if (result.method, result.seed) == (method, seed)}
    return [those[fold] for fold in folds] if set(folds) <= set(those) else []


def _pooled(parts: Sequence[StoredLogits]) -> StoredLogits:
    """The rows of all folds as one set."""
    joined = {name: np.concatenate([vars(part)[name] for part in parts]) for name in ("ids", "patients", "splits")}
    return replace(
        parts[0],
        **joined,
        labels=np.concatenate([part.labels for part in parts]),
        logits=np.concatenate([part.logits for part in parts], axis=1),
    )


def _require_same(cells: Sequence[tuple[str, str, StoredLogits]]) -> None:
    """Raise a ValueError if cells of one fold have other classes or samples."""
    firsts: dict[str, tuple[str, StoredLogits]] = {}
    for fold, title, stored in cells:
        first_title, first = firsts.setdefault(fold, (title, stored))
        if first.classes.tolist() != stored.classes.tolist():
            raise ValueError(f"{first_title} and {title} must have the same classes to be compared")
        require_same_samples(first, stored, f"the rows of {first_title} and {title}")


def _figures(stored: StoredLogits, settings: Mapping[str, Any]) -> dict[str, _Measured]:
    """By source; one that has predicted nothing, such as a modality that no row has, is left out."""
    found = {}
    for source, logits in zip(stored.sources.tolist(), stored.logits, strict=True):
        rows = np.flatnonzero(np.isfinite(logits).all(axis=1))
        if len(rows):
            labels, patients = stored.labels[rows], stored.patients[rows].tolist()
            found[source] = _Measured(
                rows, resampled_figures(logits[rows], labels, patients, stored.classes.tolist(), **settings)
            )
    return found


def _of_method(figures: Mapping[tuple[str, int], dict[str, _Measured]], name: str) -> dict[int, dict[str, _Measured]]:
    """By seed."""
    return {seed: measured for (method, seed), measured in figures.items() if method == name}


def _row(
    ours: Mapping[int, dict[str, _Measured]], reference: Mapping[int, dict[str, _Measured]], classes: Sequence[str]
) -> dict[str, Any]:
    sources = list(dict.fromkeys(source for measured in ours.values() for source in measured))
    return {
        "seeds": list(ours),
        "sources": {
            source: _source(
                {seed: each[source] for seed, each in ours.items() if source in each},
                {seed: each[source] for seed, each in reference.items() if source in each},
                classes,
            )
            for source in sources
        },
    }


def _source(
    ours: Mapping[int, _Measured], reference: Mapping[int, _Measured], classes: Sequence[str]
) -> dict[str, Any]:
    ap = [measured.figures["AP"] for measured in ours.values()]
    shared = [seed for seed in ours if seed in reference and np.array_equal(ours[seed].rows, reference[seed].rows)]
    return {
        "samples": len(next(iter(ours.values())).rows),
        "measures": {name: _mean([measured.figures[name] for measured in ours.values()]) for name in OVERALL},
        "per_class": {name: _mean([values[:, index] for values in ap]) for index, name in enumerate(classes)},
        "difference": {
            name: compared(
                np.mean([ours[seed].figures[name] - reference[seed].figures[name] for seed in shared], axis=0)
            )
            for name in OVERALL
        }
        if shared
        else None,
    }


def _mean(seeds: Sequence[Floats]) -> dict[str, float | None]:
    """Of one figure (1 + W,) of each seed: the mean with its interval, and the standard deviation of the seeds."""
    mean = np.mean(seeds, axis=0)
    values = np.array([values[0] for values in seeds])
    several = len(values) > 1 and np.isfinite(values).all()
    return figure(mean[0], mean[1:]) | {"sd": float(values.std(ddof=1)) if several else None}


def _cost(results: Sequence[Result]) -> dict[str, float | None]:
    """Of one seed: seconds of all folds together, the most memory, and means of the others."""
    known = {name: [value for each in results if (value := each.cost[name]) is not None] for name in COSTS}
    cost = {name: float(np.mean(values)) if values else None for name, values in known.items()}
    seeds = len({each.seed for each in results})
    return cost | {
        "seconds": sum(known["seconds"]) / seeds if seeds else None,
        "memory_gib": max(known["memory_gib"], default=None),
    }


def _cell(result: Result, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's own figures, without intervals."""
    alone = _figures(result.logits, {**settings, "bootstrap": 0})
    return {
        "method": result.method,
        "seed": result.seed,
        "fold": result.fold,
        "cost": {name: result.cost[name] for name in COSTS},
        "sources": {
            source: {name: figure(measured.figures[name][0], None)["value"] for name in OVERALL}
            for source, measured in alone.items()
        },
    }
