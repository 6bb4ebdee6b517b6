"""From a data set as it is published to a manifest: what the readers of all data sets share.

``mmc_amd``, ``derm7pt`` and ``mrnet`` each hold a :class:`Source`, which reads one published layout;
:func:`prepare` writes what it read. Nothing is repaired and nothing is left out in silence: what does not fit is
a ValueError of one sentence before anything is written, and what is left out has its line and its reason in
``skipped.csv``. No pixel is read here, ``ei train`` checks every image; and this module imports no torch.
"""

import csv
import io
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ei.data.manifest import SPLITS
from ei.exports import csv_bytes

SKIPPED = "skipped.csv"
_SKIPPED_COLUMNS = ("split", "item", "reason")
_PARTIAL = "is the archive unpacked completely? --partial takes what is there"


@dataclass(frozen=True)
class Case:
    """A row of the manifest to be."""

    id: str
    patient: str
    split: str
    labels: Mapping[str, str]
    """Column -> cell."""
    images: Mapping[str, tuple[Path, ...]]
    """Modality -> its files, at least one."""


@dataclass(frozen=True)
class Skip:
    """Something that the release lists and the manifest does not."""

    split: str
    item: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """What was read of a data set."""

    cases: Sequence[Case]
    skipped: Sequence[Skip]
    notes: Sequence[str]
    """What a user of the manifest should know."""
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    """Label columns: one of class names, or several of 0 and 1."""
    classes: tuple[str, ...]
    """Names in the one label column, in order; with several columns, these."""
    flags: tuple[str, ...]
    """What ``ei train`` needs beside the manifest to do as the paper did."""


@dataclass(frozen=True)
class Source(ABC):
    """A data set on disk and how it is to be read."""

    root: tyro.conf.Positional[Path]
    """Folder of the data set as it was unpacked."""
    out: Path | None = None
    """The CSV to write, in a folder above all images; without it, manifest.csv in ROOT."""
    partial: bool = False
    """Take a copy whose counts are not the release's: a part of it, or a version of your own."""

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.csv" if self.out is None else self.out

    @abstractmethod
    def read(self) -> Prepared:
        """Read the lists and labels, and look which files are there.

        Raises:
            ValueError: the folder is not what was published, in one sentence with what was expected.
        """


def prepare(source: Source) -> list[str]:
    """Read a data set, write its manifest and ``skipped.csv`` beside it, and tell what was done.

    Returns:
        Lines: each thing that was left out, notes, counts per split and class, and how to train.

    Raises:
        ValueError: the data set does not fit, or the manifest cannot refer to its images; nothing is written.
    """
    prepared = source.read()
    if not any(case.split == "train" for case in prepared.cases):
        raise ValueError(f"{source.root} has no case left to train on: all {len(prepared.skipped)} are skipped")
    path = source.manifest
    skipped = path.with_name(SKIPPED)
    columns = ("id", "patient", "split", *prepared.labels, *prepared.modalities)
    if path.name == SKIPPED:
        raise ValueError(f"out must have another name than {SKIPPED}, which is written beside it")
    _require_own(path, columns)
    _require_own(skipped, _SKIPPED_COLUMNS)
    rows = [[*_cells(case, prepared), *_image_cells(case, prepared, path.parent)] for case in prepared.cases]
    skips = [(skip.split, skip.item, skip.reason) for skip in prepared.skipped]
    _write_together({path: csv_bytes(columns, rows), skipped: csv_bytes(_SKIPPED_COLUMNS, skips)})
    command = ["ei", "train", "--manifest", str(path), *prepared.flags]
    return [*_report(prepared), f"wrote {path} and {skipped}", f"next: {shlex.join(command)}"]


# For the readers of the data sets


def find_home(root: Path, name: str, marker: str) -> Path:
    """``root``, or the folder ``name`` in it, whichever holds the folder ``marker``.

    Raises:
        ValueError: neither does.
    """
    for folder in (root, root / name):
        if (folder / marker).is_dir():
            return folder
    raise ValueError(f"{root} must be the folder {name} of the release, with {marker}/ in it; {_content(root)}")


def require_folder(path: Path, way_out: str = _PARTIAL.partition(" --")[0]) -> Path:
    """``path``, if it is a folder.

    Raises:
        ValueError: it is not; the message says what its parent holds.
    """
    if path.is_dir():
        return path
    raise ValueError(f"{path} must be a folder; {_content(path.parent)}; {way_out}")


def read_text(path: Path) -> str:
    """A text in UTF-8, with or without byte order mark.

    Raises:
        ValueError: it is missing or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8, got byte 0x{error.object[error.start]:02x}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {_content(path.parent)}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not blank, stripped.

    Raises:
        ValueError: as :func:`read_text`.
    """
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV with a header, cells stripped.

    Raises:
        ValueError: as :func:`read_text`, or a column is missing, or a row is not as long as the header.
    """
    try:
        lines = [line for line in csv.reader(io.StringIO(read_text(path), newline=""), strict=True) if any(line)]
    except csv.Error as error:
        raise ValueError(f"{path} must be a CSV: {error}") from error
    header = [cell.strip() for cell in lines[0]] if lines else []
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}; it lacks {', '.join(missing)}")
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise ValueError(f"{path} must have {len(header)} cells in every row, got {len(line)} in data row {number}")
    return [dict(zip(header, map(str.strip, line), strict=True)) for line in lines[1:]]


def require_files(files: Iterable[Path], listing: str, partial: bool) -> frozenset[Path]:
    """Those of the listed files that are missing or empty; none of them may be, unless ``partial``.

    Raises:
        ValueError: some are, and it is not ``partial``.
    """
    wanted = list(dict.fromkeys(files))
    missing = [file for file in wanted if not _has_content(file)]
    if missing and not partial:
        first = f"the first is {missing[0]}"
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} images in {listing} are missing or empty, {first}; {_PARTIAL}"
        )
    return frozenset(missing)


def files_of(cases: Iterable[Case]) -> Iterator[Path]:
    """All files of all modalities."""
    return (file for case in cases for files in case.images.values() for file in files)


def require_counts(root: Path, found: Mapping[str, int], released: Mapping[str, int]) -> None:
    """Compare with what was published.

    Raises:
        ValueError: a count differs; the message has up to four of them.
    """
    wrong = [f"{found[what]} {what} instead of {count}" for what, count in released.items() if found[what] != count]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{root} must hold the whole release, got {', '.join(wrong[:4])}{more}; {_PARTIAL}")


def require_once(names: Iterable[str], where: str) -> None:
    """Refuse names that are there more than once.

    Raises:
        ValueError: there is such a name; the message has the first.
    """
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where} must name everything once, got {twice[0]!r} more than once")


def _has_content(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False


def _content(folder: Path, most: int = 8) -> str:
    """What a folder holds, for messages."""
    if not folder.is_dir():
        return f"{folder} is a file" if folder.exists() else f"{folder} does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {', '.join(names[:most]) or 'nothing'}{more}"


# The manifest


def _require_own(path: Path, columns: Sequence[str]) -> None:
    """Refuse to write over a file that is not an earlier one of the same kind."""
    if not path.parent.is_dir():
        raise ValueError(f"out must lie in a folder that exists, got {path}")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"out must be a plain file, got {path}")
    title = csv_bytes(columns, [])
    if path.exists() and not path.read_bytes().startswith(title):
        raise ValueError(f"{path} is there and was not written by this command; remove it or choose another --out")


def _cells(case: Case, prepared: Prepared) -> list[str]:
    return [case.id, case.patient, case.split, *(case.labels[column] for column in prepared.labels)]


def _image_cells(case: Case, prepared: Prepared, folder: Path) -> list[str]:
    return [";".join(sorted(_relative(file, folder) for file in case.images[name])) for name in prepared.modalities]


def _relative(file: Path, folder: Path) -> str:
    name = Path(os.path.relpath(file, folder)).as_posix()
    # A manifest may refer to nothing outside of its folder, and links are followed there.
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)) or name.startswith("../"):
        raise ValueError(f"out must lie in a folder above all images, got {folder}, but {os.path.realpath(file)}")
    if ";" in name or name != name.strip():
        raise ValueError(f"paths of images must have no semicolon and no space at either end, got {name!r}")
    # Escaping would change the name that is read, and this does not.
    return f"./{name}" if re.match(r"['=+\-@]", name) else name


def _write_together(files: Mapping[Path, bytes]) -> None:
    """All files are written before the first gets its name, so that a full disk leaves the old ones."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, content in files.items():
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


# What is told


def _report(prepared: Prepared) -> list[str]:
    lines = [f"skipped: {skip.split} {skip.item}: {skip.reason}" for skip in prepared.skipped]
    lines += [f"note: {note}" for note in prepared.notes]
    reasons = Counter((skip.split, skip.reason) for skip in prepared.skipped)
    lines += [f"skipped in {split}: {count}, {reason}" for (split, reason), count in sorted(reasons.items())]
    return [*lines, *_count_table(prepared)]


def _count_table(prepared: Prepared) -> list[str]:
    """Cases per split and class, or per split and label that is 1."""
    titles = ["", "cases", *prepared.classes]
    lines = [titles]
    for split in SPLITS:
        cases = [case for case in prepared.cases if case.split == split]
        lines.append([split, str(len(cases)), *(str(_count(cases, name, prepared)) for name in prepared.classes)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _count(cases: Iterable[Case], name: str, prepared: Prepared) -> int:
    if len(prepared.labels) > 1:
        return sum(case.labels[name] == "1" for case in cases)
    return sum(case.labels[prepared.labels[0]] == name for case in cases)
