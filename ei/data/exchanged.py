"""Rows in which the files of two modalities look exchanged: oct's in the column cfp, and cfp's in oct.

Files are compared by their ``Facts.appearance``: size, slices, colour, brightness, contrast. For each cell of two
modalities the nearest cells of other rows are looked up. Where these are nearly all of the other modality, for both
cells of a row, the row is told; but only if the two modalities can be told apart at all, that is if hardly any row has
just one cell on the wrong side. FLAIR and T1, or left and right, look too much alike for that, and nothing is said.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ei.data.listed import Fault, ListedFile, shortened

_FEWEST_ROWS = 20
_REFERENCES = 200
"""Rows of a large table to which all are compared."""
_NEIGHBOURS = 9
_FEW_OWN = 1
"""So many of the neighbours are at most of the cell's own modality, in a row that is told."""
_MOST_ONE_SIDED, _MOST_CROSSED = 0.02, 0.25
"""Shares of the rows with one cell on the wrong side, and with both, up to which modalities can be told apart."""
_LEAST_SPREAD = 0.02
_BLOCK = 2048


@dataclass(frozen=True)
class _Column:
    """The cells of a modality."""

    rows: NDArray[np.int64]  # (N,), rising
    features: NDArray[np.float64]  # (N, features), of the files of each cell together
    files: list[ListedFile]  # the first of each cell

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.features[np.searchsorted(self.rows, rows)]

    def name(self, row: int) -> str:
        return self.files[np.searchsorted(self.rows, row)].name


def compare_modalities(listed: Sequence[ListedFile]) -> list[Fault]:
    """Warnings about rows whose cells of two modalities look exchanged.

    Args:
        listed: All files of a manifest; those without facts are passed over.
    """
    columns = _columns(listed)
    found = [fault for pair in combinations(columns, 2) for fault in _exchanged(*pair, columns)]
    return shortened(found, "rows have modalities that look exchanged")


def _columns(listed: Sequence[ListedFile]) -> dict[str, _Column]:
    files: dict[str, list[ListedFile]] = defaultdict(list)
    for file in listed:
        if file.facts and file.facts.appearance:
            files[file.modality].append(file)
    return {modality: _column(those) for modality, those in files.items()}


def _column(files: Sequence[ListedFile]) -> _Column:
    rows, first, cells = np.unique([file.row for file in files], return_index=True, return_inverse=True)
    appearances = np.array([file.facts.appearance for file in files if file.facts])
    # Lengths by their logarithms: twice as high is as far from the same as half as high.
    appearances[:, :3] = np.log(appearances[:, :3])
    features = np.zeros((len(rows), appearances.shape[1]))
    np.add.at(features, cells, appearances)
    return _Column(rows, features / np.bincount(cells)[:, None], [files[position] for position in first])


def _exchanged(one: str, other: str, columns: Mapping[str, _Column]) -> list[Fault]:
    rows = np.intersect1d(columns[one].rows, columns[other].rows)
    if len(rows) < _FEWEST_ROWS:
        return []
    features = np.stack([columns[name].of(rows) for name in (one, other)])  # (2, rows, features)
    own = _own_neighbours(features / np.maximum(features.std(axis=1).mean(axis=0), _LEAST_SPREAD))
    wrong = own <= _NEIGHBOURS // 2
    if wrong.any(0).mean() - wrong.all(0).mean() > _MOST_ONE_SIDED or wrong.all(0).mean() > _MOST_CROSSED:
        return []
    found = []
    for row in rows[(own <= _FEW_OWN).all(0)].tolist():
        names = [columns[name].name(row) for name in (one, other)]
        text = f"{one} and {other} look exchanged: {names[0]!r} is like {other} of other rows, {names[1]!r} like {one}"
        found.append(Fault(row, text))
    return found


def _own_neighbours(features: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of the nearest cells of other rows are of the same modality: (2, N, features) -> (2, N)."""
    count = features.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, _REFERENCES)).astype(int))
    references = features[:, chosen].reshape(-1, features.shape[2])
    squares = np.square(references).sum(1)
    own = np.zeros((2, count), np.int64)
    for modality in (0, 1):
        for start in range(0, count, _BLOCK):
            block = features[modality, start : start + _BLOCK]
            # Squared distances, but for what is the same for all references.
            distances = squares - 2 * block @ references.T
            distances[np.arange(start, start + len(block))[:, None] == np.tile(chosen, 2)] = np.inf
            nearest = np.argpartition(distances, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
            own[modality, start : start + len(block)] = (nearest // len(chosen) == modality).sum(1)
    return own
