"""What to do about classes of which there are few: repeat their rows, or let them count more in the loss.

Shapes: N rows, C classes.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ei.data.manifest import Row


def repetitions(rows: Sequence[Row], generator: Generator) -> list[int]:
    """How often each row is to occur in an epoch, so that every class has as many as the largest.

    With several labels per row, a row counts as one of the rarest of its labels, c, and such rows are repeated
    (count of the most frequent label) / (count of c) times, those without any label not at all.

    Args:
        rows: Labelled.
        generator: Draws which rows of a class occur once more than others.

    Returns:
        N numbers, each at least 1.

    Raises:
        ValueError: a row has no label.
    """
    counts = Counter(label for row in rows for label in _positive_labels(row))
    groups: dict[int | None, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        rarest = min(_positive_labels(row), key=lambda label: (counts[label], label), default=None)
        groups[rarest].append(index)
    copies = [1] * len(rows)
    for rarest, members in groups.items():
        if rarest is None:
            continue
        total = round(len(members) * max(counts.values()) / counts[rarest])
        each, left_over = divmod(total, len(members))
        order = torch.randperm(len(members), generator=generator).tolist()
        for position, member in enumerate(order):
            copies[members[member]] = each + (position < left_over)
    return copies


def inverse_frequencies(rows: Sequence[Row], class_count: int) -> Tensor:
    """Weights (C,) for :func:`ei.losses.classification_loss` with which every class counts the same.

    N / (C n_c) with one label per row, so that the mean weight of a row is 1 (scikit-learn's "balanced"); with several,
    the number of rows without the label for each that has it, so that both kinds count the same.

    Args:
        rows: Labelled, with every class.
        class_count: C.

    Raises:
        ValueError: a row has no label, no row is of a class, or with several labels, all rows have one.

    Example:
        Of labels 0, 0, 0, 1 the weights are 4 / 6 and 4 / 2.
    """
    several = any(isinstance(row.label, tuple) for row in rows)
    counts = Counter(label for row in rows for label in _positive_labels(row))
    if absent := [label for label in range(class_count) if not counts[label]]:
        raise ValueError(f"balance needs rows of every class, but there are none of number {absent[0]}")
    if several and (everywhere := [label for label, count in counts.items() if count == len(rows)]):
        raise ValueError(f"balance needs rows without each label, but all have number {everywhere[0]}")
    weights = [
        (len(rows) - counts[label]) / counts[label] if several else len(rows) / (class_count * counts[label])
        for label in range(class_count)
    ]
    return torch.tensor(weights)


def _positive_labels(row: Row) -> list[int]:
    if row.label is None:
        raise ValueError(f"balance needs labels, but row {row.number} has none")
    if isinstance(row.label, int):
        return [row.label]
    return [label for label, flag in enumerate(row.label) if flag]
