"""MRNet v1.0: knees in three series of MRI (axial, coronal, sagittal), with three findings each.

The layout that is read, below ``MRNet-v1.0/``::

    {train,valid}/{axial,coronal,sagittal}/NNNN.npy     (S, 256, 256), uint8
    {train,valid}-{abnormal,acl,meniscus}.csv           "0000,1", without a header

What is published as valid becomes test. 120 exams of train are held out as val: those of the paper, or as many by
a seed. The release does not say which exams are of one patient (1,130 of 1,088), so each counts as one.

Source: Bien et al., PLOS Medicine 2018; the held-out exams of arXiv 2603.17514.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ei.data.prepare import (
    Case,
    Prepared,
    Skip,
    Source,
    files_of,
    find_home,
    read_lines,
    require_counts,
    require_files,
    require_folder,
    require_once,
)

MODALITIES = ("axial", "coronal", "sagittal")
LABELS = ("abnormal", "meniscus", "acl")
RELEASED = {
    "train": {"exams": 1130, "abnormal": 913, "meniscus": 397, "acl": 208},
    "valid": {"exams": 120, "abnormal": 95, "meniscus": 52, "acl": 54},
}
_HELD_OUT = """
0000 0011 0017 0029 0038 0042 0047 0049 0051 0057 0061 0067 0077 0085 0088 0104 0114 0124 0130 0131 0159 0163 0164
0171 0182 0199 0210 0215 0217 0236 0239 0247 0256 0297 0301 0327 0341 0348 0356 0368 0379 0391 0399 0406 0411 0425
0437 0439 0440 0453 0459 0478 0489 0491 0498 0512 0552 0553 0563 0570 0571 0582 0589 0592 0594 0611 0612 0614 0639
0656 0670 0678 0685 0687 0700 0702 0704 0714 0715 0723 0733 0734 0756 0765 0767 0783 0785 0813 0815 0820 0825 0836
0841 0863 0873 0876 0880 0899 0929 0930 0937 0948 0980 0986 0989 0990 1004 1007 1008 1025 1030 1046 1057 1074 1076
1090 1093 1112 1120 1123
"""
HELD_OUT = tuple(_HELD_OUT.split())
"""Exams of train on which the paper validated."""


@dataclass(frozen=True)
class MRNet(Source):
    """MRNet: ROOT is the folder MRNet-v1.0; writes a row per exam, with three label columns of 0 and 1."""

    seed: int | None = None
    """Hold out exams by this seed instead of the paper's 120."""
    held_out: int = len(HELD_OUT)
    """How many, with --seed."""

    def read(self) -> Prepared:
        home = find_home(self.root, "MRNet-v1.0", "train")
        labels = {folder: _labels(home, folder) for folder in RELEASED}
        if not self.partial:
            require_counts(home, _flat({folder: _counts(exams) for folder, exams in labels.items()}), _flat(RELEASED))
        validation = self._validation(sorted(labels["train"]))
        cases = [
            _case(home, folder, exam, flags, "test" if folder == "valid" else "val" if exam in validation else "train")
            for folder, exams in labels.items()
            for exam, flags in exams.items()
        ]
        require_once((case.id for case in cases), "train and valid")
        missing = require_files(files_of(cases), "the label files", self.partial)
        absent = {case.id: [name for name in MODALITIES if case.images[name][0] in missing] for case in cases}
        incomplete = [
            Skip(case.split, case.id, f"no file of its {' and '.join(absent[case.id])} series")
            for case in cases
            if absent[case.id]
        ]
        return Prepared(
            cases=[case for case in cases if not absent[case.id]],
            skipped=[*incomplete, *_unlabelled(home, labels)],
            notes=[],
            modalities=MODALITIES,
            labels=LABELS,
            classes=LABELS,
            flags=("--config", "mrnet-clip"),
        )

    def _validation(self, exams: Sequence[str]) -> frozenset[str]:
        if self.seed is None:
            return frozenset(HELD_OUT)
        if not 0 <= self.held_out < len(exams):
            raise ValueError(f"held_out must be at least 0 and below the {len(exams)} exams, got {self.held_out}")
        return frozenset(random.Random(self.seed).sample(exams, self.held_out))


def _labels(home: Path, folder: str) -> dict[str, dict[str, str]]:
    """Exam -> label -> "0" or "1", in the order of the files."""
    for plane in MODALITIES:
        require_folder(home / folder / plane)
    columns = {name: _column(home / f"{folder}-{name}.csv") for name in LABELS}
    first = columns[LABELS[0]]
    for name, column in columns.items():
        if odd := sorted(first.keys() ^ column.keys()):
            files = f"{folder}-{LABELS[0]}.csv and {folder}-{name}.csv"
            raise ValueError(f"{files} must have the same exams, got {odd[0]} ({len(odd)} in all) in one of them only")
    for exam in first:
        if first[exam] == "0" and any(column[exam] == "1" for column in columns.values()):
            raise ValueError(
                f"{folder}-abnormal.csv must have 1 for every exam with a finding, got 0 for {exam};"
                " are the label files swapped?"
            )
    return {exam: {name: column[exam] for name, column in columns.items()} for exam in first}


def _column(path: Path) -> dict[str, str]:
    column = {}
    rows = [[cell.strip() for cell in line.split(",")] for line in read_lines(path)]
    for number, row in enumerate(rows, start=1):
        exam, value = row if len(row) == 2 else ("", "")
        if len(exam) != 4 or not (exam.isascii() and exam.isdigit()) or value not in ("0", "1"):
            line = f"{','.join(row)!r} in line {number}"
            raise ValueError(f"{path} must have lines such as 0000,1 and no header, got {line}")
        column[exam] = value
    require_once((row[0] for row in rows), str(path))
    return column


def _counts(exams: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    positive = {name: sum(flags[name] == "1" for flags in exams.values()) for name in LABELS}
    return {"exams": len(exams)} | positive


def _flat(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {f"{folder} {what}": count for folder, each in counts.items() for what, count in each.items()}


def _case(home: Path, folder: str, exam: str, labels: Mapping[str, str], split: str) -> Case:
    images = {plane: (home / folder / plane / f"{exam}.npy",) for plane in MODALITIES}
    return Case(id=exam, patient=exam, split=split, labels=labels, images=images)


def _unlabelled(home: Path, labels: Mapping[str, Mapping[str, object]]) -> list[Skip]:
    return [
        Skip("none", f"{folder}/{plane}/{file.name}", "no label of this exam")
        for folder, exams in labels.items()
        for plane in MODALITIES
        for file in sorted((home / folder / plane).glob("*.npy"))
        if file.stem not in exams
    ]
