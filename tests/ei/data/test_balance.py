"""Weights against scikit-learn's; repetitions are tested as epochs, in test_dataset.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from ei.data.balance import inverse_frequencies
from ei.data.manifest import Row


def labelled(*labels: int | tuple[int, ...] | None) -> list[Row]:
    return [
        Row(number, str(number), str(number), "train", label, {"oct": (Path("x.png"),)})
        for number, label in enumerate(labels)
    ]


def test_weights_are_scikit_learns_balanced_ones() -> None:
    labels = [0, 0, 0, 2, 1, 1, 0, 2, 0]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(labels))
    torch.testing.assert_close(inverse_frequencies(labelled(*labels), 3), torch.tensor(expected, dtype=torch.float32))
    of_rows = inverse_frequencies(labelled(*labels), 3)[labels]
    torch.testing.assert_close(of_rows.mean(), torch.tensor(1.0))


def test_with_several_labels_both_answers_weigh_the_same() -> None:
    flags = [(1, 1), (0, 1), (0, 1), (0, 0)]
    weights = inverse_frequencies(labelled(*flags), 2)
    positives = torch.tensor(flags).sum(0)
    torch.testing.assert_close(weights * positives, 4.0 - positives)


def test_a_label_that_all_rows_have_is_refused() -> None:
    """Its positives would weigh nothing."""
    with pytest.raises(ValueError, match="rows without each label, but all have number 1"):
        inverse_frequencies(labelled((1, 1), (0, 1)), 2)


def test_a_class_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of every class, but there are none of number 1"):
        inverse_frequencies(labelled(0, 2, 2), 3)
