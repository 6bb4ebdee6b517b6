"""Intervals from resampling patients, with all their rows, because the rows of a patient are not independent.

Shapes: N samples, P patients, W resamplings.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEWEST_PATIENTS = 5
"""With fewer patients than this an interval would say more than the data do."""
NUMBERS_AT_ONCE = 2_000_000
"""Bounds memory: resamplings come in portions of so many float64, of which some ten arrays are held at a time."""


def patient_weights(patients: Sequence[str], resamplings: int, seed: int) -> Iterator[Floats]:
    """How often each row counts in each resampling of the patients, in portions of (W, N).

    Args:
        patients: whose sample each row is, N names.
        resamplings: W in all; 0 gives nothing, and so do fewer than :data:`FEWEST_PATIENTS` patients.
        seed: the same one draws the same patients.

    >>> weights = next(patient_weights(["a", "a", "b", "c", "d", "e"], resamplings=3, seed=0))
    >>> weights.shape, weights[:, 1:].sum(axis=1).tolist()  # as many patients as there are, 'a' with both its rows
    ((3, 6), [5.0, 5.0, 5.0])
    """
    names, patient_of_row = np.unique(np.asarray(patients, str), return_inverse=True)
    if len(names) < FEWEST_PATIENTS:
        return
    generator = np.random.default_rng(seed)
    for size in portions(resamplings, len(patient_of_row)):
        draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
        yield draws[:, patient_of_row].astype(float)


def portions(total: int, width: int) -> Iterator[int]:
    """How many of ``total`` rows of ``width`` numbers to hold at a time.

    >>> list(portions(5, 1_000_000))
    [2, 2, 1]
    """
    portion = max(1, NUMBERS_AT_ONCE // width)
    for start in range(0, total, portion):
        yield min(portion, total - start)


def figure(value: float, resampled: Floats | None) -> dict[str, float | None]:
    """A value with the 2.5th and 97.5th percentile of what resamplings gave, for JSON: None for what is undefined.

    Args:
        value: may be nan, and then has no interval.
        resampled: (W,), nan where it is undefined; None without resampling.

    >>> figure(0.5, None)
    {'value': 0.5, 'low': None, 'high': None}
    """
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    defined = np.empty(0) if resampled is None else resampled[~np.isnan(resampled)]
    low, high = np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) else (None, None)
    return {"value": float(value), "low": low, "high": high}
