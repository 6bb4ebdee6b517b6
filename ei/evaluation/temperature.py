"""The temperatures of a run: fitted on validation rows, kept with the model that they belong to. Imports no torch."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ei.metrics.calibration import doubtful_temperatures, fit_temperature
from ei.progress import say
from ei.runs.folder import RunFolder


def fit_temperatures(logits: Mapping[str, np.ndarray], labels: np.ndarray, *, multi_label: bool) -> dict[str, float]:
    """One for the fused prediction and one for each modality's own.

    Where none fits, 1 is taken; this is said, and which are far from it.

    Args:
        logits: source -> (N, C), of validation rows; rows that are not finite have no such modality.
        labels: (N,) class indices, or (N, C) of 0 and 1.
        multi_label: which of them.
    """
    temperatures = {}
    for source, values in logits.items():
        rows = np.isfinite(values).all(axis=1)
        temperatures[source] = (
            fit_temperature(values[rows], labels[rows], multi_label=multi_label) if rows.any() else 1.0
        )
    if unfit := [source for source, temperature in temperatures.items() if temperature == 1]:
        say(f"note: no temperature lowers the loss on the val rows for {', '.join(unfit)}; 1 is taken")
    if remark := doubtful_temperatures(temperatures):
        say(f"note: {remark}")
    return temperatures


def temperature_file(folder: RunFolder, temperatures: Mapping[str, float]) -> dict[str, Any]:
    """The content of ``temperature.json``."""
    return {"model": _model_hash(folder), "temperatures": dict(temperatures)}


def read_temperatures(folder: RunFolder) -> dict[str, float]:
    """What was fitted for the model that the run has now.

    Raises:
        ValueError: nothing, or for another model, or the file is damaged; the message says what to do.
    """
    advice = f"'ei evaluate {folder.path}' fits it"
    if not folder.temperature.is_file():
        raise ValueError(f"the run {folder.path} has no temperature yet ({folder.temperature} is missing); {advice}")
    try:
        stored = json.loads(folder.temperature.read_text(encoding="utf-8"))
        model = stored["model"]
        temperatures = {source: float(value) for source, value in stored["temperatures"].items()}
        if not all(0 < value < math.inf for value in temperatures.values()):
            raise ValueError("temperatures must be positive")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder.temperature} is damaged; {advice} again") from error
    if model != _model_hash(folder):
        raise ValueError(f"{folder.temperature} was fitted for another model than {folder.stage2.best}; {advice} again")
    return temperatures


def _model_hash(folder: RunFolder) -> str:
    return hashlib.sha256(folder.stage2.best.read_bytes()).hexdigest()
