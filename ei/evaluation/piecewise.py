"""Predict the rows of a manifest: in pieces, which outlive a kill and may be shared by several processes.

Rows fall into pieces of whole batches, the same ones whoever predicts them: process i of n takes the pieces i, i + n,
i + 2n, ... Each is written beside the table as soon as it is done, and the table is made once all are there. So a
process that is killed loses one piece at most, and the table has the same bytes however the work was shared or broken
off (on one machine and one number of threads; others may differ in the last digits, which is said). Processes that
torchrun has started share them by themselves.
"""

import csv
import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ei.config import Config
from ei.data.listed import counted
from ei.data.manifest import Manifest, Row, read_manifest
from ei.evaluation.inference import predict_batches
from ei.evaluation.predictions import Predictions
from ei.evaluation.shard import Shard
from ei.evaluation.tables import prediction_table
from ei.evaluation.temperature import read_temperatures
from ei.exports import csv_bytes, plain
from ei.processes import Processes
from ei.progress import say
from ei.runs.folder import RunFolder
from ei.runs.loading import load
from ei.runs.setup import MAY_CHANGE, require_positions, require_usable, tell_warnings
from ei.runtime import environment
from mor.files import write_atomically

FORMAT = "ei-prediction-1"
_MOST_PIECES = 1000
"""Enough that little is lost and work can be shared, and so few that writing them takes no time."""
_LONGEST_TITLE = 1_000_000
_PATHS = {"data": {"manifest"}, "model": {"weights", "aux_weights"}, "train": {"stage1_from"}}
"""Settings that are other on another machine; what they lead to is hashed, or compared when the run is loaded."""


def predict(run: str | Path, manifest: str | Path, out: str | Path, shard: str = "") -> bool:
    """Predict every row of a manifest, which needs no labels, and write a CSV with probabilities.

    What was done is kept in the folder ``OUT.parts``: the same call goes on from there, with or without ``shard``.

    Args:
        run: A folder written by :func:`ei.train`.
        manifest: CSV with ``id`` and the columns of the run's modalities, whose cells may be empty if the run was
            trained with ``allow_missing`` or ``modality_dropout``.
        out: The CSV to write; columns are id, patient, split, label (both empty), ``fused:CLASS``,
            ``MODALITY:CLASS`` (empty for a modality that the row lacks) and ``weight:MODALITY``.
        shard: "I/N": predict the I-th of N shares only. Whichever process finds that nothing is missing writes the
            CSV; ``OUT.parts`` is then of no more use, and left to be deleted.

    Returns:
        Whether the CSV was written; if not, other shards have still to come.

    Raises:
        ValueError: the run, the manifest or ``shard`` cannot be used; or ``out`` is a file that is no earlier table of
            predictions.
    """
    out = Path(out)
    if out.is_dir() or out.resolve() == Path(manifest).resolve():
        raise ValueError(f"out must be a file of its own, got {out}")
    _require_replaceable(out)
    require_usable(_parts(out))
    share = Shard.parse(shard) if shard else None
    model, config = load(run)
    temperatures = read_temperatures(RunFolder(Path(run))) if config.train.temperature else {}
    processes = Processes.join(config.train.device)
    if share and processes.count > 1:
        raise ValueError(
            "shard must be left out where torchrun has started several processes: they share by themselves"
        )
    share = share or Shard(processes.index + 1, processes.count)
    data = replace(config.data, allow_missing=config.data.knows_missing)
    with processes.first_before_others():  # images that one has read, the others need not
        table = read_manifest(manifest, data, classes=data.classes, labelled=False)
    tell_warnings(table, manifest)
    require_positions(config, table)
    at_once = config.train.samples_at_once(1)
    origin = _origin(RunFolder(Path(run)), config, Path(manifest), table) | {"temperatures": str(temperatures)}
    pieces = Pieces(out, table.rows, at_once, origin)
    mine = range(share.number - 1, pieces.count, share.count)
    there = pieces.read(mine)
    if there:
        say(f"{out}: going on, {len(there)} of {counted(len(mine), 'piece')} are there")
    todo = [number for number in mine if number not in there]
    if todo:
        rows = [row for number in todo for row in pieces.rows_of(number)]
        once = replace(config, data=replace(config.data, cache=""))  # nothing is read a second time
        batches = predict_batches(model.to(processes.device), rows, once, device=processes.device)
        scaled = (predictions.at(temperatures) for predictions in batches)
        _make(pieces, todo, scaled, table, environment(processes.device))
    if shard:
        return pieces.finish(share)
    processes.gathered(None)  # all are through
    return processes.first(pieces.finish)


def _require_replaceable(out: Path) -> None:
    """Refuse to write over a file that is neither empty nor a table of predictions: a manifest, or an image."""
    if not out.is_file() or not out.stat().st_size:
        return
    with out.open(newline="", encoding="utf-8", errors="replace") as file:
        title = next(csv.reader([file.readline(_LONGEST_TITLE)]), [])
    if title[:4] != ["id", "patient", "split", "label"] or not title[4:] or not title[4].startswith("fused:"):
        raise ValueError(f"{out} is there and holds no predictions; remove it or choose another --out")


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _make(
    pieces: "Pieces", numbers: Sequence[int], batches: Iterator[Predictions], table: Manifest, where: Mapping[str, str]
) -> None:
    """Write these pieces, out of batches that have exactly their rows."""
    for number in numbers:
        lines: list[dict[str, Any]] = []
        while unpredicted := pieces.rows_of(number)[len(lines) :]:
            lines += prediction_table(next(batches), unpredicted[: pieces.at_once], table)
        pieces.write(number, lines, where)
    next(batches, None)  # to the end, which stops the processes that load


@dataclass(frozen=True)
class Piece:
    """Some rows of the table, as text without the header."""

    columns: list[str]
    environment: dict[str, str]
    text: bytes


@dataclass(frozen=True)
class Pieces:
    """The pieces of a table, in the folder beside it."""

    out: Path
    rows: Sequence[Row]
    at_once: int
    """Rows of a batch."""
    origin: Mapping[str, str]
    """What they are made of; a piece of anything else is not used."""

    @property
    def folder(self) -> Path:
        return _parts(self.out)

    @property
    def size(self) -> int:
        """Rows of a piece; whole batches, because the last bits of a row depend on those beside it."""
        return self.at_once * math.ceil(len(self.rows) / self.at_once / _MOST_PIECES)

    @property
    def count(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def rows_of(self, number: int) -> Sequence[Row]:
        return self.rows[number * self.size : (number + 1) * self.size]

    def read(self, numbers: Iterable[int]) -> dict[int, Piece]:
        """Those that are there; which are damaged, or of something else, is said."""
        found, useless = {}, defaultdict(list)
        for number in numbers:
            try:
                found[number] = self._read(number)
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                useless[str(error)].append(self._path(number).name)
        for reason, names in useless.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            say(f"{self.folder}: {', '.join(names[:3])}{more} cannot be used: {reason}")
        return found

    def write(self, number: int, lines: Sequence[Mapping[str, Any]], environment: Mapping[str, str]) -> None:
        """Whole or not at all."""
        columns = list(lines[0])
        notes = {"number": number, "of": self.origin, "columns": columns, "environment": environment}
        text = csv_bytes(columns, [line.values() for line in lines]).removeprefix(csv_bytes(columns, ()))
        content = json.dumps(notes).encode() + b"\n" + text
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(number), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    def finish(self, share: Shard | None = None) -> bool:
        """Write the table if all is there; without a ``share`` it must be, and the pieces are removed.

        Raises:
            ValueError: there are not all pieces, or not each row of the manifest once, in its order.
        """
        there = self.read(range(self.count))
        missing = [number for number in range(self.count) if number not in there]
        if missing and share:
            others = sorted({number % share.count + 1 for number in missing})
            say(f"shard {share} is done; still to come, of {share.count}: {', '.join(map(str, others))}")
            return False
        if missing:
            raise ValueError(
                f"{self.folder} lost pieces while they were made; does another process predict to {self.out}?"
            )
        self._merge([there[number] for number in range(self.count)])
        if not share:
            self._remove()
        return True

    def _merge(self, pieces: Sequence[Piece]) -> None:
        content = csv_bytes(pieces[0].columns, ()) + b"".join(piece.text for piece in pieces)
        ids = [plain(line["id"]) for line in csv.DictReader(io.StringIO(content.decode(), newline=""))]
        if ids != [row.id for row in self.rows] or any(piece.columns != pieces[0].columns for piece in pieces):
            raise ValueError(f"{self.folder} does not hold each row of the manifest once; delete it and predict again")
        for name, values in _differing(pieces).items():
            say(
                f"note: pieces were predicted with several {name} ({', '.join(values)}); last digits may differ by that"
            )
        write_atomically(self.out, content)

    def _remove(self) -> None:
        for path in self.folder.glob("*piece-*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files are in it
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"piece-{number + 1:04d}"

    def _read(self, number: int) -> Piece:
        checksum, _, content = self._path(number).read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != checksum:
            raise ValueError("damaged")
        notes, _, text = content.partition(b"\n")
        known = json.loads(notes)
        other = [part for part, value in self.origin.items() if known["of"].get(part) != value]
        if other or known["number"] != number:
            raise ValueError(f"made with another {other[0]}" if other else "of other rows")
        return Piece(known["columns"], known["environment"], text)


def _origin(folder: RunFolder, config: Config, manifest: Path, table: Manifest) -> dict[str, str]:
    """All that the table depends on, by hashes; the names end the sentence "made with another"."""
    settings = config.to_dict()
    for section, names in (*MAY_CHANGE.items(), *_PATHS.items()):
        settings[section] = {name: value for name, value in settings[section].items() if name not in names}
    settings["train"]["at once"] = config.train.samples_at_once(1)
    return {
        "version of this package": FORMAT,
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "state of the images": table.images_hash,
        "trained model": hashlib.sha256(folder.stage2.best.read_bytes()).hexdigest(),
        "configuration": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
    }


def _differing(pieces: Sequence[Piece]) -> dict[str, list[str]]:
    """Where they were predicted, if not all in the same place."""
    names = pieces[0].environment
    found = {name: sorted({piece.environment.get(name, "") for piece in pieces}) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}
