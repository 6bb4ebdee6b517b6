"""The manifest: a CSV with one row per sample, checked as a whole before anything is done with it.

Columns, in any order, others are ignored:

========================  =================================================================================
``id``                    the sample's name, unique
``split``                 train, val or test
``patient``               optional, else the id; a patient may be in one split only
the label column(s)       one of class names, or several of 0 and 1 (then a sample may have several labels)
one column per modality   image paths relative to the CSV, '/' between folders; several in one quoted cell,
                          separated by ';', are used in sorted order; with ``allow_missing`` a cell may be
                          empty, though not all of a row's
========================  =================================================================================

What is refused is a fault; what may be meant is a warning. One image under two patients is a fault if they are in
two splits, and a warning if they are in one; so are images that look the same in two splits.

Comma-separated, UTF-8 with or without a byte order mark, any line ends, blank lines allowed. This module
imports no torch.
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path, PureWindowsPath

from ei.config import DataConfig
from ei.data.audit import AuditCache, Checked, Facts, audit_image
from ei.data.exchanged import compare_modalities
from ei.data.images import ImageError
from ei.data.listed import (
    SPLITS,
    Fault,
    ListedFile,
    compare_channels,
    compare_copies,
    compare_looks,
    compare_scales,
    counted,
)
from ei.intensity import Intensity

FAULTS_SHOWN = 20
"""Of those that a message holds; the error has all of them."""

_MISSING_VALUES = ("nan", "<na>", "#n/a", "null")
"""What tables write for a value that is not there."""
_BLOCK = 4096
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
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
    """Modality -> its files, sorted; none if the sample lacks it."""
    checked: dict[Path, Checked] = field(default_factory=dict, compare=False, repr=False)
    """What each of the files was when it was read for the check."""

    def has_all(self, modalities: Collection[str]) -> bool:
        """Whether the sample has an image of each of these modalities."""
        return all(self.images[modality] for modality in modalities)

    def count_images(self, modality: str, config: DataConfig) -> int:
        """How many images of a modality the model gets of the sample, at most: files, and slices of volumes."""
        counts = [config.slices if self.checked[file].slices > 1 else 1 for file in self.images[modality]]
        return max(counts, default=0) if config.images == "one" else sum(counts)

    def only(self, modalities: Collection[str]) -> "Row":
        """The same sample, as if it had no others than these modalities."""
        return replace(self, images={name: files if name in modalities else () for name, files in self.images.items()})


@dataclass(frozen=True)
class Manifest:
    """A table without faults."""

    rows: tuple[Row, ...]
    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    multi_label: bool
    warnings: tuple["Fault", ...] = ()
    """What may be meant, and may be an oversight."""
    images_hash: str = ""
    """SHA-256 over the contents of all images of the file, row by row: the table itself only names them."""

    def split(self, name: str) -> list[Row]:
        """The rows of a split, in the file's order.

        Raises:
            ValueError: there is no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"name must be one of {', '.join(SPLITS)}, got {name!r}")
        return [row for row in self.rows if row.split == name]

    def having(self, modality: str) -> "Manifest":
        """The rows that have an image of a modality."""
        return replace(self, rows=tuple(row for row in self.rows if row.images[modality]))

    def missing(self) -> dict[str, dict[str, int]]:
        """How many rows of each split lack a modality: modality -> split -> count, without zeros."""
        lacking = {name: Counter(row.split for row in self.rows if not row.images[name]) for name in self.modalities}
        return {name: dict(counts) for name, counts in lacking.items() if counts}


class ManifestError(ValueError):
    """A manifest that cannot be used, with all faults by row; the message holds the first of them."""

    def __init__(self, path: Path, faults: Sequence[Fault], warnings: Sequence[Fault] = ()) -> None:
        super().__init__(path, faults, warnings)
        self.path = path
        self.faults = tuple(faults)
        self.warnings = tuple(warnings)

    @property
    def problems(self) -> list[str]:
        """One line for each fault."""
        return [str(fault) for fault in self.faults]

    def __str__(self) -> str:
        if [fault.row for fault in self.faults] == [0]:
            return f"the manifest '{self.path}' {self.faults[0].text}"
        title = f"{self.path} has {counted(len(self.faults), 'problem')}:"
        lines = [title, *self.problems[:FAULTS_SHOWN]]
        if more := len(self.faults) - FAULTS_SHOWN:
            lines += [f"... and {more} more; 'ei check --json' lists all"] if more > 0 else []
        return "\n  ".join(lines)


def read_manifest(
    path: str | Path,
    config: DataConfig,
    *,
    classes: Sequence[str] | None = None,
    labelled: bool = True,
    split: str = "",
    cache: bool = True,
) -> Manifest:
    """Read a manifest and check all of it, every image included.

    Args:
        path: the CSV file.
        config: names the columns (``modalities``, ``labels``) and, unless ``classes`` does, the classes.
        classes: the classes of a finished run, in its order. Without them the manifest is one to train on:
            it must have train rows, and the classes are ``config.classes``, or all names in the label
            column, sorted. With several label columns, their names are the classes.
        labelled: False for prediction: the label and split columns may be missing, and are not looked at.
        split: of all rows, instead of what the split column says, which may be missing.
        cache: image files that were read before and have not changed since are not read again.

    Raises:
        ManifestError: the file has faults; all of them are listed, each with its row.
        ValueError: ``config`` or ``classes`` do not fit each other.

    Example:
        With ``modalities=("cfp", "oct")``, this file has two rows of two classes, amd = 0 and normal = 1::

            id,split,label,cfp,oct
            p1,train,normal,cfp/p1.png,oct/p1.png
            p2,test,amd,cfp/p2.png,"oct/p2_0.png;oct/p2_1.png"
    """
    path = Path(path)
    text = read_text(path)
    _require_fitting(config, classes, labelled)
    problems, warnings = _Problems(), _Problems()
    needed = [name for name in _needed_columns(config, labelled) if name != "split" or not split]
    records = _parse(text, needed, problems)
    if split:
        records = [replace(record, cells={**record.cells, "split": split}) for record in records]
    _check_filled(records, needed, config, problems)
    _check_ids(records, problems)
    if labelled:
        _check_splits(records, problems, (split,) if split else SPLITS, must_train=classes is None)
        _check_patients(records, problems)
    order = _class_order(records, config, classes, labelled, problems)
    labels = _labels(records, config, order, problems) if labelled else [None] * len(records)
    files = _Files(path.parent, config, problems)
    images_of = [files.of(record) for record in records]
    files.audit(use_cache=cache)
    for compare in (compare_scales, compare_channels, compare_modalities):
        warnings.extend(compare(files.listed))
    if labelled:
        leaks, copies = compare_copies(files.listed)
        problems.extend(leaks)
        warnings.extend([*copies, *compare_looks(files.listed)])
    if labelled and not problems:  # a row with a fault may be the one that a split lacks
        _check_classes(records, config, order, warnings)
    if faults := problems.by_row():
        raise ManifestError(path, faults, warnings.by_row())
    rows = tuple(
        Row(
            record.number,
            record["id"],
            record.patient,
            record["split"] if labelled else "",
            label,
            images,
            {path: files.checked[path] for paths in images.values() for path in paths},
        )
        for record, label, images in zip(records, labels, images_of, strict=True)
    )
    told = tuple(warnings.by_row())
    return Manifest(rows, config.modalities, order, config.multi_label, told, _hash_of_images(rows))


def _hash_of_images(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for modality, paths in row.images.items():
            digest.update(f"{modality!r} {[row.checked[path].sha256 for path in paths]}\n".encode())
    return digest.hexdigest()


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
    given = list(names)
    return [] if len(set(given)) == len(given) else [name for name, count in Counter(given).items() if count > 1]


class _Problems:
    """What was found so far."""

    def __init__(self) -> None:
        self._found: list[Fault] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, row: int, text: str) -> None:
        self._found.append(Fault(row, text))

    def extend(self, faults: Iterable[Fault]) -> None:
        self._found.extend(faults)

    def by_row(self) -> list[Fault]:
        return sorted(self._found, key=lambda fault: fault.row)


@dataclass(frozen=True, slots=True)
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


def read_text(path: Path) -> str:
    """The text of a manifest.

    Raises:
        ManifestError: there is no such file, it is not UTF-8, or its columns are not separated by commas.
    """
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
            raise ManifestError(path, [Fault(0, what)])
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(path, [Fault(0, f"cannot be read: {error.strerror}")]) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as 'CSV UTF-8'"
        raise ManifestError(path, [Fault(row, problem)]) from error
    if "\0" in text:
        raise ManifestError(path, [Fault(0, "holds NUL bytes, so it is not a text in UTF-8")])
    title = next((line for line in text.splitlines() if line.strip()), "")
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
        if delimiter in title and "," not in title:
            problem = f"columns are separated by {name}; save the file with commas between columns"
            raise ManifestError(path, [Fault(1, problem)])
    return text


def _parse(text: str, needed: list[str], problems: _Problems) -> list[_Record]:
    """The rows that have as many cells as the header."""
    lines = list(_numbered_cells(text, problems))
    if len(lines) < 2 and not problems:
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
            hint = "; --labels names another" if (column,) == DataConfig.labels else ""
            problems.add(number, f"column {column!r} is missing; the file has {found}{hint}")
    for column in _repeated(header):
        if column in (*needed, "patient"):
            problems.add(number, f"column {column!r} is there twice")


def _check_filled(records: list[_Record], needed: list[str], config: DataConfig, problems: _Problems) -> None:
    for record in records:
        for column in (*needed, "patient"):
            cell = record.cells.get(column)
            if cell == "" and column not in config.modalities:
                problems.add(record.number, f"{column} is empty")
            elif cell and cell.lower() in _MISSING_VALUES:
                problems.add(record.number, f"{column} is {cell!r}, which is how tables write a missing value")
        empty = [modality for modality in config.modalities if record.cells.get(modality) == ""]
        if not config.allow_missing:
            for modality in empty:
                way_out = "a sample may lack a modality only in a run that is trained with --allow-missing"
                problems.add(record.number, f"{modality} is empty; {way_out}")
        elif len(empty) == len(config.modalities):
            problems.add(record.number, f"has no image at all: {', '.join(empty)} must not all be empty")


def _check_ids(records: list[_Record], problems: _Problems) -> None:
    first: dict[str, int] = {}
    for record in records:
        if record["id"] and first.setdefault(record["id"], record.number) != record.number:
            problems.add(record.number, f"id {record['id']!r} is already that of row {first[record['id']]}")


def _check_splits(records: list[_Record], problems: _Problems, known: Sequence[str], must_train: bool) -> None:
    for record in records:
        if record["split"] and record["split"] not in known:
            problems.add(record.number, f"split must be {_either(known)}, got {record['split']!r}")
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
    if len(found) == 1 and not problems:
        problems.add(0, f"has one class only in column {column!r}, {found[0]!r}; at least two are needed")
    return found


def _labels(
    records: list[_Record], config: DataConfig, classes: Sequence[str], problems: _Problems
) -> list[int | tuple[int, ...] | None]:
    if config.multi_label:
        return [_flags(record, config.labels, problems) for record in records]
    numbers = {name: number for number, name in enumerate(classes)}
    return [_class_index(record, config.labels[0], numbers, problems) for record in records]


def _flags(record: _Record, columns: Sequence[str], problems: _Problems) -> tuple[int, ...]:
    for column in columns:
        if record[column] not in ("", "0", "1"):
            problems.add(record.number, f"{column} must be 0 or 1, got {record[column]!r}")
    return tuple(int(record[column] == "1") for column in columns)


def _class_index(record: _Record, column: str, numbers: Mapping[str, int], problems: _Problems) -> int | None:
    name = record[column]
    if name and name not in numbers:
        problems.add(record.number, f"{column} must be {_either(list(numbers))}, got {name!r}")
    return numbers.get(name)


class _Files:
    """The files of every row, each of them read once to the end, however often it is listed."""

    def __init__(self, folder: Path, config: DataConfig, problems: _Problems) -> None:
        self.listed: list[ListedFile] = []
        self.checked: dict[Path, Checked] = {}
        self._folder = folder
        self._root = os.path.realpath(folder)
        self._config = config
        self._problems = problems
        self._known: dict[str, tuple[Path, str, str]] = {}
        self._real_folder = lru_cache(maxsize=None)(os.path.realpath)

    def of(self, record: _Record) -> dict[str, tuple[Path, ...]]:
        return {modality: self._of(record, modality) for modality in self._config.modalities}

    def _of(self, record: _Record, modality: str) -> tuple[Path, ...]:
        paths = []
        for name in _file_names(record, modality, self._problems):
            path, place, objection = self._known.get(name) or self._known.setdefault(name, self._look_up(name))
            paths.append(path)
            if objection:
                self._problems.add(record.number, f"{modality}: {name!r} {objection}")
            else:
                self.listed.append(ListedFile(record.number, record["split"], record.patient, modality, name, place))
        return tuple(paths)

    def _look_up(self, name: str) -> tuple[Path, str, str]:
        """The path, where it leads, and why it is refused; empty if it is not."""
        place = self._real(os.path.join(self._root, name))
        return self._folder / name, place, _objection(name, place, None if self._config.allow_outside else self._root)

    def _real(self, path: str) -> str:
        """Where a path leads; links are followed, so that one that leads out is found outside."""
        folder, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):
            return os.path.realpath(path)
        return os.path.join(self._real_folder(folder), name)

    def audit(self, use_cache: bool) -> None:
        """Read every file under the rule of its modality."""
        rules = {modality: self._config.intensity_of(modality) for modality in self._config.modalities}
        tasks: dict[tuple[str, Intensity], Path] = {}
        for listed in self.listed:
            tasks.setdefault((listed.place, rules[listed.modality]), self._known[listed.name][0])
        cache = AuditCache(self._folder) if use_cache else None
        found: dict[tuple[str, Intensity], Facts | str] = {}
        # Threads, because decoders work outside of Python's lock; by blocks, because each task in wait takes room.
        with ThreadPoolExecutor() as pool:
            waiting = iter(tasks.items())
            while block := list(islice(waiting, _BLOCK)):
                results = pool.map(lambda task: _facts_or_fault(task[1], task[0][1], cache), block)
                found.update(zip((task for task, _ in block), results, strict=True))
        if cache:
            cache.save()
        for listed in self.listed:
            result = found[listed.place, rules[listed.modality]]
            if isinstance(result, Facts):
                listed.facts = result
                self.checked.setdefault(
                    self._known[listed.name][0], Checked(result.sha256, result.state, result.slices)
                )
            else:
                self._problems.add(listed.row, f"{listed.modality}: {result}")


def _facts_or_fault(path: Path, intensity: Intensity, cache: AuditCache | None) -> Facts | str:
    try:
        return cache.facts(path, intensity, audit_image) if cache else audit_image(path, intensity)
    except ImageError as error:
        return str(error)


def _file_names(record: _Record, modality: str, problems: _Problems) -> list[str]:
    names = sorted(filter(None, (name.strip() for name in record[modality].split(";"))))
    if record[modality] and not names:
        problems.add(record.number, f"{modality} names no file")
    for name in _repeated(names):
        problems.add(record.number, f"{modality}: {name!r} is listed twice")
    return names


def _objection(name: str, place: str, root: str | None) -> str:
    """Why a path is refused before anything is opened; empty if it is not. Without ``root`` it may lead anywhere."""
    if _ADDRESS.match(name):
        return "is an address; write the path of a file, relative to the manifest"
    if root is None:
        return ""
    if name.startswith("/") or PureWindowsPath(name).is_absolute():
        return "is an absolute path; write it relative to the manifest, or pass --allow-outside"
    if not Path(place).is_relative_to(root):
        return "leads out of the manifest's folder; this needs --allow-outside"
    return ""


def _check_classes(records: list[_Record], config: DataConfig, classes: Sequence[str], warnings: _Problems) -> None:
    """Classes that a split lacks, or a modality in training; and names that are nearly the same."""
    for split in SPLITS:
        rows = [record for record in records if record["split"] == split]
        lacking = _lacking(rows, config, classes)
        if rows and lacking:
            effect = "they cannot be learned" if split == "train" else "metrics leave them out"
            warnings.add(0, f"has no {split} row of {', '.join(lacking)}; {effect}")
        for modality in config.modalities if split == "train" else ():
            without = set(_lacking([record for record in rows if record[modality]], config, classes)) - set(lacking)
            if without:
                effect = "the first stage cannot learn them"
                warnings.add(0, f"has no train row of {', '.join(sorted(without))} with {modality}; {effect}")
    spelt: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        spelt[_as_spelt(name)].append(name)
    for names in spelt.values():
        if len(names) > 1:
            warnings.add(0, f"has classes whose names are nearly the same: {', '.join(map(repr, names))}")


def _as_spelt(name: str) -> str:
    """The same for names that differ in capitals and spaces, or are one number.

    >>> [_as_spelt(name) for name in ("Wet AMD", "wetamd", "1", "1.0", "01")]
    ['wetamd', 'wetamd', '1.0', '1.0', '1.0']
    """
    plain = "".join(name.casefold().split())
    try:
        return str(float(plain))
    except ValueError:
        return plain


def _lacking(records: list[_Record], config: DataConfig, classes: Sequence[str]) -> list[str]:
    """The classes that no row is of."""
    if config.multi_label:
        return [name for name in classes if not any(record[name] == "1" for record in records)]
    present = {record[config.labels[0]] for record in records}
    return [name for name in classes if name not in present]
