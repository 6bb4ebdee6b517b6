"""The worst errors: which samples, and what is told of them."""

import json
from pathlib import Path

import numpy as np

from ei.data.manifest import Row
from ei.evaluation.worst import worst_errors

FOLDER = Path("/study")


def row(number: int, label: int | tuple[int, ...], **files: str) -> Row:
    images = {modality: (FOLDER / name,) for modality, name in files.items()}
    return Row(number + 2, f"id {number}", f"patient {number}", "test", label, images)


def test_the_lowest_probability_of_the_true_class_comes_first() -> None:
    logits = np.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    rows = [row(number, label) for number, label in enumerate((0, 2, 1, 1))]
    found = worst_errors({"fused": logits}, rows, "abc", multi_label=False, count=3, folder=FOLDER)
    assert [sample["id"] for sample in found] == ["id 3", "id 1", "id 2"]
    assert found[0]["patient"] == "patient 3" and found[0]["labels"] == [1]
    for sample in found:
        (label,) = sample["labels"]
        assert sample["loss"] == -np.log(sample["probabilities"]["fused"][label])
    json.dumps(found, allow_nan=False)


def test_with_several_labels_the_mean_over_decisions_counts() -> None:
    logits = np.array([[5.0, -5.0], [5.0, 5.0], [0.1, -0.1]])
    rows = [row(number, label) for number, label in enumerate(((1, 0), (0, 0), (1, 0)))]
    found = worst_errors({"fused": logits}, rows, "ab", multi_label=True, count=9, folder=FOLDER)
    assert [sample["id"] for sample in found] == ["id 1", "id 2", "id 0"]
    assert [sample["labels"] for sample in found] == [[], [0], [0]]


def test_a_sample_without_a_modality_has_no_probabilities_of_it() -> None:
    logits = {"fused": np.zeros((2, 2)), "oct": np.array([[1.0, 1.0], [np.nan, np.nan]])}
    rows = [row(0, 0, cfp="a.png", oct="b.png"), row(1, 0, cfp="a.png")]
    found = worst_errors(logits, rows, "ab", multi_label=False, count=2, folder=FOLDER)
    assert [sample["probabilities"]["oct"] for sample in found] == [[0.5, 0.5], None]
    assert [sample["files"] for sample in found] == [{"cfp": ["a.png"], "oct": ["b.png"]}, {"cfp": ["a.png"]}]


def test_files_are_named_from_the_manifests_folder_where_they_lie_in_it() -> None:
    rows = [row(0, 0, inside="deep/a.png", beside="../b.png", elsewhere="/other/c.png")]
    (found,) = worst_errors({"fused": np.zeros((1, 2))}, rows, "ab", multi_label=False, count=1, folder=FOLDER)
    assert found["files"] == {"inside": ["deep/a.png"], "beside": ["../b.png"], "elsewhere": ["/other/c.png"]}
