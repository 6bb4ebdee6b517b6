"""Files as a manifest lists them, and what only their comparison shows: copies, lookalikes, unused bits."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ei.data.audit import ALIKE, Facts, likeness

SPLITS = ("train", "val", "test")

_MOST_COMPARISONS = 300_000_000
"""Of images across splits, in the search for those that look the same: some seconds."""
_BLOCK = 1024
_SHOWN = 50
"""Findings of a kind that are told one by one."""
_PLACES_SHOWN = 8
_DARK = 8192
"""Where all files of 16 bits stay below it, they are taken to have fewer bits."""


class Fault(NamedTuple):
    """Something wrong with a row; row 0 stands for the file as a whole."""

    row: int
    text: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.text}" if self.row else f"file: {self.text}"


@dataclass(slots=True)
class ListedFile:
    """A file in a cell."""

    row: int
    split: str
    patient: str
    modality: str
    name: str
    """As the cell has it."""
    place: str
    """Its real path."""
    facts: Facts | None = None
    """None until it is read, and if it cannot be used."""

    def __str__(self) -> str:
        split = f", {self.split}" if self.split else ""
        return f"{self.name!r} (row {self.row}{split}, patient {self.patient!r})"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def compare_copies(listed: Sequence[ListedFile]) -> tuple[list[Fault], list[Fault]]:
    """Files with the same bytes under several patients.

    Returns:
        Those in several splits, which leak; those within one.
    """
    same: dict[str, dict[str, ListedFile]] = defaultdict(dict)
    for file in listed:
        if file.facts and file.patient:
            same[file.facts.sha256].setdefault(file.patient, file)
    leaks: list[Fault] = []
    within: list[Fault] = []
    for files in (list(by_patient.values()) for by_patient in same.values() if len(by_patient) > 1):
        others = [file for file in files if file.split != files[0].split]
        where = f" in {len({file.split for file in files})} splits" if others else ""
        reported = (others or files[1:])[0]
        shown = [files[0], reported, *(file for file in files[1:] if file is not reported)][:_PLACES_SHOWN]
        places = ", ".join(map(str, shown))
        text = f"{reported.modality}: the same image is that of {len(files)} patients{where}: {places}"
        (leaks if others else within).append(Fault(reported.row, text))
    return leaks, shortened(within, "images are the same for several patients of one split")


def compare_looks(listed: Sequence[ListedFile]) -> list[Fault]:
    """Files that look alike, but are not the same, under two patients in two splits."""
    by_split: dict[str, dict[str, ListedFile]] = {split: {} for split in SPLITS}
    for file in listed:
        if file.facts and file.facts.fingerprint and file.split in SPLITS:
            by_split[file.split].setdefault(file.facts.sha256, file)
    pairs = list(combinations((list(files.values()) for files in by_split.values() if files), 2))
    if sum(len(ours) * len(theirs) for ours, theirs in pairs) > _MOST_COMPARISONS:
        return [Fault(0, "has so many images that those which look the same in two splits were not looked for")]
    found = [
        Fault(other.row, f"{other.modality}: {other} looks like {one}")
        for ours, theirs in pairs
        for one, other in _lookalikes(ours, theirs)
    ]
    return shortened(found, "pairs of images look the same in two splits")


def compare_scales(listed: Sequence[ListedFile]) -> list[Fault]:
    """Modalities whose files of 16 bits seem to have fewer."""
    brightest: dict[str, dict[str, int]] = defaultdict(dict)
    for file in listed:
        if file.facts and file.facts.brightest:
            brightest[file.modality][file.place] = file.facts.brightest
    found = []
    for modality, numbers in brightest.items():
        largest = max(numbers.values())
        if largest < _DARK:
            bits = largest.bit_length()
            files = counted(len(numbers), "file")
            text = f"the largest number in its {files} of 16 bits is {largest}, and 65535 would be white"
            way_out = f"if {bits} bits are meant, set --intensity to 0:{2**bits - 1}"
            found.append(Fault(0, f"{modality}: {text}; {way_out}"))
    return found


def compare_channels(listed: Sequence[ListedFile]) -> list[Fault]:
    """Modalities whose .npy files all have three slices, as arrays with the colours first seem to."""
    slices: dict[str, set[int]] = defaultdict(set)
    for file in listed:
        if file.facts:
            is_array = file.place.lower().endswith(".npy")
            slices[file.modality].add(file.facts.slices if is_array else 0)
    text = "its .npy files are read as three grey slices each; if these are colours, they must come last, (H, W, 3)"
    return [Fault(0, f"{modality}: {text}") for modality, numbers in slices.items() if numbers == {3}]


def _lookalikes(ours: Sequence[ListedFile], theirs: Sequence[ListedFile]) -> Iterator[tuple[ListedFile, ListedFile]]:
    fingerprints = [file.facts.fingerprint for file in theirs if file.facts]
    for start in range(0, len(ours), _BLOCK):
        block = ours[start : start + _BLOCK]
        alike = likeness([file.facts.fingerprint for file in block if file.facts], fingerprints) >= ALIKE
        for row, column in np.argwhere(alike):
            one, other = block[row], theirs[column]
            is_copy = one.facts and other.facts and one.facts.sha256 == other.facts.sha256
            if not is_copy and one.patient != other.patient:
                yield one, other


def shortened(found: list[Fault], what: str) -> list[Fault]:
    """The first of many, and how many there are."""
    count = len(found)
    return [*found[:_SHOWN], Fault(0, f"{count} {what}; {_SHOWN} of them are told")] if count > _SHOWN else found
