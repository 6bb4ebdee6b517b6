"""Derm7pt: a clinical and a dermoscopic image of each case, in five groups of diagnoses.

The layout that is read, below ``release_v0/``::

    meta/meta.csv                                   a row per case, with diagnosis and the two images' paths
    meta/{train,valid,test}_indexes.csv             rows of meta.csv, counted from 0
    images/NEL/NEL025.JPG                           upper and lower case as it happens

The release names no patients, so each case counts as one.

Source: derm.cs.sfu.ca; groups as jeremykawahara/derm7pt, in the order of arXiv 2603.17514 (SK before MISC).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ei.data.prepare import (
    Case,
    Prepared,
    Skip,
    Source,
    files_of,
    find_home,
    read_table,
    require_counts,
    require_files,
    require_folder,
    require_once,
)

MODALITIES = ("clinic", "derm")
COLUMNS = (
    "case_num",
    "diagnosis",
    "seven_point_score",
    "pigment_network",
    "streaks",
    "pigmentation",
    "regression_structures",
    "dots_and_globules",
    "blue_whitish_veil",
    "vascular_structures",
    "level_of_diagnostic_difficulty",
    "elevation",
    "location",
    "sex",
    "management",
    "clinic",
    "derm",
    "case_id",
    "notes",
)
GROUPS = {
    "BCC": ("basal cell carcinoma",),
    "NEV": (
        "nevus",
        "blue nevus",
        "clark nevus",
        "combined nevus",
        "congenital nevus",
        "dermal nevus",
        "recurrent nevus",
        "reed or spitz nevus",
    ),
    "MEL": (
        "melanoma",
        "melanoma (in situ)",
        "melanoma (less than 0.76 mm)",
        "melanoma (0.76 to 1.5 mm)",
        "melanoma (more than 1.5 mm)",
        "melanoma metastasis",
    ),
    "SK": ("seborrheic keratosis",),
    "MISC": ("dermatofibroma", "lentigo", "melanosis", "miscellaneous", "vascular lesion"),
}
RELEASED = {
    "train": {"BCC": 19, "NEV": 256, "MEL": 90, "SK": 16, "MISC": 32},
    "val": {"BCC": 7, "NEV": 100, "MEL": 61, "SK": 10, "MISC": 25},
    "test": {"BCC": 16, "NEV": 219, "MEL": 101, "SK": 19, "MISC": 40},
}
CLINIC_IS_DERM = "its clinic image is its derm image again"

_INDEXES = {"train": "train_indexes.csv", "val": "valid_indexes.csv", "test": "test_indexes.csv"}
_GROUP_OF = {diagnosis: group for group, diagnoses in GROUPS.items() for diagnosis in diagnoses}


@dataclass(frozen=True)
class Derm7pt(Source):
    """Derm7pt: ROOT is the folder release_v0; writes a row per case."""

    grouping: Literal["five", "melanoma", "diagnosis"] = "five"
    """five: BCC, NEV, MEL, SK, MISC, as the paper; melanoma: MEL or other; diagnosis: as meta.csv has it."""
    image_folder: str = "images"
    """Folder of the images, such as that of a copy in another size."""
    drop_copies: bool = False
    """Leave out the cases whose clinical image was missing and is the dermoscopic one again (nine in the release)."""

    def read(self) -> Prepared:
        home = find_home(self.root, "release_v0", "meta")
        folder = require_folder(home / self.image_folder, "name it with --image-folder")
        path = home / "meta" / "meta.csv"
        rows = read_table(path, COLUMNS)
        _require_rows(rows, path)
        splits = _splits(home / "meta", len(rows))
        if not self.partial:
            _require_release(home, rows, splits)
        finder = _Finder(folder)
        cases = [self._case(rows[index], split, finder) for index, split in sorted(splits.items())]
        missing = require_files(files_of(cases), str(path), self.partial)
        reasons = {case.id: self._reason_to_skip(case, missing) for case in cases}
        kept = [case for case in cases if not reasons[case.id]]
        classes = self._classes(rows)
        return Prepared(
            cases=kept,
            skipped=[
                *(Skip(case.split, case.id, reasons[case.id]) for case in cases if reasons[case.id]),
                *_in_no_split(rows, splits),
            ],
            notes=[*finder.notes(), *_copies(kept)],
            modalities=MODALITIES,
            labels=("label",),
            classes=classes,
            flags=("--config", "derm7pt-clip", *(() if self.grouping == "five" else ("--classes", ",".join(classes)))),
        )

    def _reason_to_skip(self, case: Case, missing: frozenset[Path]) -> str:
        """Empty if there is none."""
        absent = [name for name in MODALITIES if case.images[name][0] in missing]
        if absent:
            return f"no file of its {' and '.join(absent)} image"
        return CLINIC_IS_DERM if self.drop_copies and _is_copy(case) else ""

    def _case(self, row: Mapping[str, str], split: str, finder: "_Finder") -> Case:
        return Case(
            id=row["case_num"],
            patient=row["case_num"],
            split=split,
            labels={"label": self._label(row["diagnosis"])},
            images={name: (finder.find(row[name]),) for name in MODALITIES},
        )

    def _label(self, diagnosis: str) -> str:
        if self.grouping == "diagnosis":
            return diagnosis
        group = _GROUP_OF[diagnosis]
        return group if self.grouping == "five" or group == "MEL" else "other"

    def _classes(self, rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
        if self.grouping == "diagnosis":
            return tuple(sorted({row["diagnosis"] for row in rows}))
        return tuple(GROUPS) if self.grouping == "five" else ("other", "MEL")


def _require_release(home: Path, rows: Sequence[Mapping[str, str]], splits: Mapping[int, str]) -> None:
    found = Counter(f"{split} {_GROUP_OF[rows[index]['diagnosis']]} cases" for index, split in splits.items())
    released = {f"{split} {name} cases": n for split, groups in RELEASED.items() for name, n in groups.items()}
    found["rows"], released["rows"] = len(rows), sum(released.values())
    require_counts(home, found, released)


def _is_copy(case: Case) -> bool:
    return case.images["clinic"] == case.images["derm"]


def _copies(cases: Sequence[Case]) -> list[str]:
    return [f"case {case.id} of {case.split} is kept, but {CLINIC_IS_DERM}" for case in cases if _is_copy(case)]


def _in_no_split(rows: Sequence[Mapping[str, str]], splits: Mapping[int, str]) -> list[Skip]:
    return [
        Skip("none", row["case_num"], "in none of the index files")
        for index, row in enumerate(rows)
        if index not in splits
    ]


def _require_rows(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    require_once((row["case_num"] for row in rows), f"case_num of {path}")
    for number, row in enumerate(rows, start=1):
        where = f"data row {number} of {path}"
        if row["diagnosis"] not in _GROUP_OF:
            raise ValueError(f"{where} must have one of {len(_GROUP_OF)} known diagnoses, got {row['diagnosis']!r}")
        for name in ("case_num", *MODALITIES):
            if not row[name]:
                raise ValueError(f"{where} must have a {name}, got an empty cell")
        for name in MODALITIES:
            if PurePosixPath(row[name]).is_absolute() or ".." in PurePosixPath(row[name]).parts:
                raise ValueError(f"{where} must have a {name} path inside of the images' folder, got {row[name]!r}")


def _splits(folder: Path, count: int) -> dict[int, str]:
    """Row of meta.csv, from 0 -> split."""
    splits: dict[int, str] = {}
    for split, name in _INDEXES.items():
        for row in read_table(folder / name, ("indexes",)):
            text = row["indexes"]
            index = int(text) if text.isascii() and text.isdigit() else count
            if index >= count:
                raise ValueError(f"{folder / name} must have rows of meta.csv, 0 to {count - 1}, got {text!r}")
            if index in splits:
                raise ValueError(f"{folder / name} must have rows of its own, got {index}, which is in {splits[index]}")
            splits[index] = split
    return splits


class _Finder:
    """Paths as meta.csv writes them to files, by upper and lower case only if nothing else fits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[Path, dict[str, list[str]]] = {}
        self._renamed: dict[str, Path] = {}

    def find(self, written: str) -> Path:
        """The file, which need not exist.

        Raises:
            ValueError: several files differ from what is written by case only.
        """
        exact = self._folder / written
        if exact.exists():
            return exact
        found = self._folder
        for part in PurePosixPath(written).parts:
            matches = [part] if (found / part).exists() else self._listing(found).get(part.lower(), [])
            if len(matches) > 1:
                raise ValueError(f"{written} must be one file in {self._folder}, got {' and '.join(matches)}")
            if not matches:
                return exact
            found /= matches[0]
        self._renamed[written] = found.relative_to(self._folder)
        return found

    def notes(self) -> list[str]:
        return [f"meta.csv writes {written}, the file is {found}" for written, found in self._renamed.items()]

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """Lower-case name -> the names in a folder; each folder is listed once."""
        if folder not in self._names:
            names: dict[str, list[str]] = {}
            for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
                names.setdefault(entry.name.lower(), []).append(entry.name)
            self._names[folder] = names
        return self._names[folder]
