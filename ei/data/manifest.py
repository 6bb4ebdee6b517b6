"""The manifest: a CSV with one row per sample, checked as a whole before anything is done with it.

Columns, in any order, others are ignored:

========================  =================================================================================
``id``                    the sample's name, unique
``split``                 train, val or test
``patient``               optional, else the id; a patient may be in one split only
the label column(s)       one of class names, or several of 0 and 1 (then a sample may have several labels)
one column per modality   image paths relative to the CSV, '/' between folders; several in one quoted cell,
                          separated by ';', are used in sorted order
========================  =================================================================================

Comma-separated, UTF-8 with or without a byte order mark, any line ends, blank lines allowed. This module
imports no torch.
"""

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ei.config import DataConfig
from ei.data.images import ImageError, check_image

SPLITS = ("train", "val", "test")

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Row:
    """One sample of a manifest."""

    number: int
    """Line of the file on which the row begins; the header's is 1."""
    id: str
    patient: str
    split: str
    """One of SPLITS; empty when the manifest was read without labels."""
    label: int | tuple[int, ...] | None
    """Index into the classes; or one 0 or 1 for each of them; None without labels."""
    images: dict[str, tuple[Path, ...]]
    """Modality -> its files, at least one, sorted."""


@dataclass(frozen=True)
class Manifest:
    """A table without faults."""

    rows: tuple[Row, ...]
    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    multi_label: bool

    def split(self, name: str) -> list[Row]:
        """The rows of a split, in the file's order.

        Raises:
            ValueError: there is no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"name must be one of {', '.join(SPLITS)}, got {name!r}")
        return [row for row in self.rows if row.split == name]


class ManifestError(ValueError):
    """A manifest that cannot be used; ``problems`` has one line for each fault, by row."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        super().__init__(path, problems)
        self.path = path
        self.problems = list(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        title = f"{self.path} has {count} {'problem' if count == 1 else 'problems'}:"
        return "\n  ".join([title, *self.problems])


def read_manifest(
    path: str | Path, config: DataConfig, *, classes: Sequence[str] | None = None, labelled: bool = True
) -> Manifest:
    """Read a manifest and check all of it, every image included.

    Args:
        path: the CSV file.
        config: names the columns (``modalities``, ``labels``) and, unless ``classes`` does, the classes.
        classes: the classes of a finished run, in its order. Without them the manifest is one to train on:
            it must have train rows, and the classes are ``config.classes``, or all names in the label
            column, sorted. With several label columns, their names are the classes.
        labelled: False for prediction: the label and split columns may be missing, and are not looked at.

    Raises:
        ManifestError: the file has faults; all of them are listed, each with its row.
        ValueError: ``config`` or ``classes`` do not fit each other.

    Example:
        With ``modalities=("cfp", "oct")``, this file has two rows of two classes, amd = 0 and normal = 1::

            id,split,label,cfp,oct
            p1,train,normal,cfp/p1.png,oct/p1.png
            p2,test,amd,cfp/p2.png,"oct/p2_0.png;oct/p2_1.png"
    """
    _require_fitting(config, classes, labelled)
    path = Path(path)
    problems = _Problems()
    needed = _needed_columns(config, labelled)
    records = _parse(_read_text(path), needed, problems)
    _check_filled(records, needed, problems)
    _check_ids(records, problems)
    if labelled:
        _check_splits(records, problems, must_train=classes is None)
        _check_patients(records, problems)
    order = _class_order(records, config, classes, labelled, problems)
    labels = _labels(records, config, order, problems) if labelled else [None] * len(records)
    images = _images(path.parent, records, config.modalities, problems)
    if lines := problems.lines():
        raise ManifestError(path, lines)
    rows = tuple(
        Row(record.number, record["id"], record.patient, record["split"] if labelled else "", label, files)
        for record, label, files in zip(records, labels, images, strict=True)
    )
    return Manifest(rows, config.modalities, order, multi_label=config.multi_label)


def _require_fitting(config: DataConfig, classes: Sequence[str] | None, labelled: bool) -> None:
    if not config.modalities:
        raise ValueError("modalities must name at least one column of the manifest, got none")
    if labelled and not config.labels:
        raise ValueError("labels must name at least one column of the manifest, got none")
    needed = [*_needed_columns(config, labelled), "patient"]
    if twice := _repeated(needed):
        raise ValueError(f"labels and modalities must be columns of their own, got {', '.join(twice)} twice")
    given = tuple(config.classes if classes is None else classes)
    if labelled and config.multi_label and given not in ((), config.labels):
        raise ValueError(f"classes must be the several label columns, {config.labels}, got {given}")


def _needed_columns(config: DataConfig, labelled: bool) -> list[str]:
    return ["id", *(["split", *config.labels] if labelled else []), *config.modalities]


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


class _Problems:
    """What is wrong with a file, by row; row 0 stands for the file as a whole."""

    def __init__(self) -> None:
        self._found: list[tuple[int, str]] = []

    def add(self, row: int, text: str) -> None:
        self._found.append((row, text))

    def lines(self) -> list[str]:
        in_order = sorted(self._found, key=lambda problem: problem[0])
        return [f"row {row}: {text}" if row else f"file: {text}" for row, text in in_order]


@dataclass(frozen=True)
class _Record:
    """One row as text."""

    number: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        """The cell; empty where the file has no such column, which is reported once, for the header."""
        return self.cells.get(column, "")

    @property
    def patient(self) -> str:
        return self["patient"] if "patient" in self.cells else self["id"]


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ManifestError(path, [f"file: {'is not a regular file' if path.exists() else 'does not exist'}"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(path, [f"file: {error.strerror}"]) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        problem = f"row {row}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as 'CSV UTF-8'"
        raise ManifestError(path, [problem]) from error
    if "\0" in text:
        raise ManifestError(path, ["file: holds NUL bytes, so it is not a text in UTF-8"])
    return text


def _parse(text: str, needed: list[str], problems: _Problems) -> list[_Record]:
    """The rows that have as many cells as the header."""
    title = next((line for line in text.splitlines() if line.strip()), "")
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
        if delimiter in title and "," not in title:
            problems.add(1, f"columns are separated by {name}; save the file with commas between columns")
            return []
    lines = list(_numbered_cells(text, problems))
    if len(lines) < 2 and not problems.lines():
        problems.add(0, "has no rows below the header" if lines else "is empty; its first line must name the columns")
    if not lines:
        return []
    (title_number, header), *body = lines
    _check_header(title_number, header, needed, problems)
    records = []
    for number, cells in body:
        if len(cells) == len(header):
            records.append(_Record(number, dict(zip(header, cells, strict=True))))
        else:
            problems.add(number, f"has {len(cells)} cells, but the header has {len(header)}")
    return records


def _numbered_cells(text: str, problems: _Problems) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not blank, each with the number of the line on which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(number, f"cannot be read, nor what follows: {error} (is a quotation mark missing?)")
            return
        if any(cells):
            yield number, cells


def _check_header(number: int, header: list[str], needed: list[str], problems: _Problems) -> None:
    for column in needed:
        if column not in header:
            found = ", ".join(filter(None, header))
            problems.add(number, f"column {column!r} is missing; the file has {found}")
    for column in _repeated(header):
        if column in (*needed, "patient"):
            problems.add(number, f"column {column!r} is there twice")


def _check_filled(records: list[_Record], needed: list[str], problems: _Problems) -> None:
    for record in records:
        for column in (*needed, "patient"):
            if record.cells.get(column) == "":
                problems.add(record.number, f"{column} is empty")


def _check_ids(records: list[_Record], problems: _Problems) -> None:
    first: dict[str, int] = {}
    for record in records:
        if record["id"] and first.setdefault(record["id"], record.number) != record.number:
            problems.add(record.number, f"id {record['id']!r} is already that of row {first[record['id']]}")


def _check_splits(records: list[_Record], problems: _Problems, must_train: bool) -> None:
    for record in records:
        if record["split"] and record["split"] not in SPLITS:
            problems.add(record.number, f"split must be {_either(SPLITS)}, got {record['split']!r}")
    has_splits = any(record["split"] for record in records)
    if must_train and has_splits and not any(record["split"] == "train" for record in records):
        problems.add(0, "has no row with split train, so there is nothing to learn from")


def _check_patients(records: list[_Record], problems: _Problems) -> None:
    """A patient in two splits is reported once, at the first row that is not in the split of the first."""
    seen: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["split"] in SPLITS and record.patient:
            seen[record.patient][record["split"]].append(record.number)
    for patient, splits in seen.items():
        if len(splits) > 1:
            places = ", ".join(f"{split} ({_rows(numbers)})" for split, numbers in splits.items())
            row = sorted(numbers[0] for numbers in splits.values())[1]
            problems.add(row, f"patient {patient!r} is in {len(splits)} splits: {places}")


def _rows(numbers: list[int]) -> str:
    return f"{'row' if len(numbers) == 1 else 'rows'} {', '.join(map(str, numbers))}"


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _class_order(
    records: list[_Record],
    config: DataConfig,
    classes: Sequence[str] | None,
    labelled: bool,
    problems: _Problems,
) -> tuple[str, ...]:
    if config.multi_label:
        return config.labels
    given = tuple(config.classes if classes is None else classes)
    if given or not labelled:
        return given
    column = config.labels[0]
    found = tuple(sorted({record[column] for record in records} - {""}))
    # With other faults the file may hold classes that were not understood.
    if len(found) == 1 and not problems.lines():
        problems.add(0, f"has one class only in column {column!r}, {found[0]!r}; at least two are needed")
    return found


def _labels(
    records: list[_Record], config: DataConfig, classes: Sequence[str], problems: _Problems
) -> list[int | tuple[int, ...] | None]:
    if config.multi_label:
        return [_flags(record, config.labels, problems) for record in records]
    return [_class_index(record, config.labels[0], classes, problems) for record in records]


def _flags(record: _Record, columns: Sequence[str], problems: _Problems) -> tuple[int, ...]:
    for column in columns:
        if record[column] not in ("", "0", "1"):
            problems.add(record.number, f"{column} must be 0 or 1, got {record[column]!r}")
    return tuple(int(record[column] == "1") for column in columns)


def _class_index(record: _Record, column: str, classes: Sequence[str], problems: _Problems) -> int | None:
    name = record[column]
    if name in classes:
        return classes.index(name)
    if name:
        problems.add(record.number, f"{column} must be {_either(classes)}, got {name!r}")
    return None


def _images(
    folder: Path, records: list[_Record], modalities: Sequence[str], problems: _Problems
) -> list[dict[str, tuple[Path, ...]]]:
    """The files of every row, each of them read once to the end, however often it is listed."""
    root = os.path.realpath(folder)
    paths: dict[str, Path] = {}
    listed: dict[str, list[tuple[int, str]]] = defaultdict(list)
    images = []
    for record in records:
        files = {}
        for modality in modalities:
            names = _file_names(record, modality, problems)
            files[modality] = tuple(folder / name for name in names)
            for name in names:
                # Links are followed, so that one that leads out is found outside.
                place = os.path.realpath(os.path.join(root, name))
                if objection := _objection(name, place, root):
                    problems.add(record.number, f"{modality}: {name!r} {objection}")
                else:
                    paths.setdefault(place, folder / name)
                    listed[place].append((record.number, modality))
        images.append(files)
    for places, fault in zip(listed.values(), _image_faults(paths.values()), strict=True):
        for row, modality in places if fault else ():
            problems.add(row, f"{modality}: {fault}")
    return images


def _file_names(record: _Record, modality: str, problems: _Problems) -> list[str]:
    names = sorted(filter(None, (name.strip() for name in record[modality].split(";"))))
    if record[modality] and not names:
        problems.add(record.number, f"{modality} names no file")
    for name in _repeated(names):
        problems.add(record.number, f"{modality}: {name!r} is listed twice")
    return names


def _objection(name: str, place: str, root: str) -> str:
    """Why a path is refused before anything is opened; empty if it is not."""
    if _ADDRESS.match(name):
        return "is an address; write the path of a file, relative to the manifest"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        return "is an absolute path; write it relative to the manifest"
    if not Path(place).is_relative_to(root):
        return "leads out of the manifest's folder"
    return ""


def _image_faults(paths: Iterable[Path]) -> list[str]:
    # Threads, because decoders work outside of Python's lock.
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_image_fault, paths))


def _image_fault(path: Path) -> str:
    try:
        check_image(path)
    except ImageError as error:
        return str(error)
    return ""
