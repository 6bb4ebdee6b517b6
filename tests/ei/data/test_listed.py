"""Copies, lookalikes and unused bits among files that were read, given by their facts alone."""

import re
from base64 import b64encode
from dataclasses import replace

import numpy as np
import pytest

from ei.data import listed
from ei.data.audit import Facts
from ei.data.listed import Fault, ListedFile, compare_channels, compare_copies, compare_looks, compare_scales


def look(seed: int) -> str:
    return b64encode(np.random.default_rng(seed).integers(0, 256, 256, dtype=np.uint8).tobytes()).decode()


def file(row: int, split: str, patient: str, content: str = "", seed: int | None = None) -> ListedFile:
    facts = Facts(content or f"content of {row}", "" if seed is None else look(seed))
    return ListedFile(row, split, patient, "oct", f"{row}.png", f"/{row}.png", facts)


def test_a_copy_in_another_split_leaks_and_one_in_the_same_does_not() -> None:
    files = [file(2, "train", "p", "x"), file(3, "train", "q", "x"), file(4, "val", "r", "y"), file(5, "val", "s", "y")]
    assert compare_copies(files) == (
        [],
        [
            Fault(
                3,
                "oct: the same image is that of 2 patients: '2.png' (row 2, train, patient 'p'),"
                " '3.png' (row 3, train, patient 'q')",
            ),
            Fault(
                5,
                "oct: the same image is that of 2 patients: '4.png' (row 4, val, patient 'r'),"
                " '5.png' (row 5, val, patient 's')",
            ),
        ],
    )
    leaks, within = compare_copies([*files, file(6, "test", "t", "x")])
    assert leaks == [
        Fault(
            6,
            "oct: the same image is that of 3 patients in 2 splits: '2.png' (row 2, train, patient 'p'),"
            " '6.png' (row 6, test, patient 't'), '3.png' (row 3, train, patient 'q')",
        )
    ]
    assert [fault.row for fault in within] == [5]


def test_a_patient_may_have_an_image_twice() -> None:
    assert compare_copies([file(2, "train", "p", "x"), file(3, "train", "p", "x")]) == ([], [])


def test_lookalikes_are_sought_between_splits_and_between_patients() -> None:
    files = [
        file(2, "train", "p", seed=1),
        file(3, "train", "q", seed=1),
        file(4, "val", "r", seed=2),
        file(5, "test", "s", seed=1),
        file(6, "test", "p", seed=1),
        file(7, "test", "t", "content of 2", seed=1),  # a copy, which is told as such
        replace(file(8, "test", "u"), facts=None),
        file(9, "test", "v"),
    ]
    found = compare_looks(files)
    assert [(fault.row, fault.text.split("looks like ")[1][:7]) for fault in found] == [
        (5, "'2.png'"),
        (5, "'3.png'"),
        (6, "'3.png'"),
        (7, "'3.png'"),
    ]


def test_all_blocks_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [file(row, "train", str(row), seed=row) for row in range(2, 12)]
    files += [file(row + 100, "test", str(row + 100), seed=row) for row in range(2, 12)]
    for block in (1024, 3):
        monkeypatch.setattr(listed, "_BLOCK", block)
        assert [fault.row for fault in compare_looks(files)] == list(range(102, 112))


def test_many_findings_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed, "_SHOWN", 2)
    files = [file(row, "train" if row < 5 else "test", str(row), seed=1) for row in range(8)]
    assert [str(fault) for fault in compare_looks(files)][2:] == [
        "file: 15 pairs of images look the same in two splits; 2 of them are told"
    ]
    monkeypatch.setattr(listed, "_MOST_COMPARISONS", 14)
    assert [fault.text.split(" that")[0] for fault in compare_looks(files)] == ["has so many images"]


@pytest.mark.parametrize(
    ("brightest", "told"), [([4095, 900], "2 files of 16 bits is 4095.*0:4095$"), ([65000, 900], ""), ([8192], "")]
)
def test_unused_bits_are_told_once_for_a_modality(brightest: list[int], told: str) -> None:
    files = [
        replace(file(row, "train", "p"), facts=Facts("x", brightest=number)) for row, number in enumerate(brightest)
    ]
    found = compare_scales([*files, *files, file(9, "train", "p")])
    assert len(found) == bool(told)
    if told:
        assert re.search(told, found[0].text)


@pytest.mark.parametrize(
    ("slices", "suffix", "told"),
    [((3, 3), ".npy", True), ((3, 4), ".npy", False), ((1,), ".npy", False), ((3,), ".nii", False)],
)
def test_arrays_with_their_colours_first_are_told(slices: tuple[int, ...], suffix: str, told: bool) -> None:
    """(3, H, W) is a volume of three grey slices, and often meant to be a picture in colour."""
    listed = [
        replace(file(row, "train", "p"), place=f"{row}{suffix}", facts=Facts("x", slices=count))
        for row, count in enumerate(slices)
    ]
    assert bool(compare_channels(listed)) == told
