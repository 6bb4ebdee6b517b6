"""The samples that a model is most wrong about."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ei.data.manifest import Row
from ei.metrics.calibration import log_losses, probabilities
from ei.metrics.resampling import Floats


def worst_errors(
    logits: Mapping[str, Floats],
    rows: Sequence[Row],
    classes: Sequence[str],
    *,
    multi_label: bool,
    count: int,
    folder: str | PathLike[str],
) -> list[dict[str, Any]]:
    """The ``count`` samples with the highest log loss of the fused prediction, worst first, ready for JSON.

    With one label per sample these are the ones whose true class has the lowest probability; with several, the
    mean over the decisions counts.

    Args:
        logits: "fused" and each modality -> (N, C), nan where a sample has no such modality.
        rows: the N samples, with labels.
        classes: C names.
        multi_label: whether a sample may have several labels.
        count: how many, at most.
        folder: of the manifest; files in it are named relative to it.

    Returns:
        Per sample ``id``, ``patient``, ``labels`` (its true classes, by index), ``loss``, ``probabilities`` (source
        -> C numbers, or None) and ``files`` (modality -> paths).
    """
    labels = np.array([row.label for row in rows])
    positives = labels.astype(bool) if multi_label else np.eye(len(classes), dtype=bool)[labels]
    losses = log_losses(np.asarray(logits["fused"], float), positives, multi_label)
    probs = {source: probabilities(values, multi_label) for source, values in logits.items()}
    return [
        {
            "id": rows[index].id,
            "patient": rows[index].patient,
            "labels": np.flatnonzero(positives[index]).tolist(),
            "loss": float(losses[index]),
            "probabilities": {
                source: values[index].tolist() if np.isfinite(values[index]).all() else None
                for source, values in probs.items()
            },
            "files": {
                modality: [_relative(path, Path(folder)) for path in files]
                for modality, files in rows[index].images.items()
            },
        }
        for index in np.argsort(-losses, kind="stable")[:count].tolist()
    ]


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
