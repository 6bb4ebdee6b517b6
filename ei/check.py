"""What 'ei check' tells of a manifest: as lines for people, as JSON for programs. Imports no torch."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ei.config import DataConfig
from ei.data.formats.picture import PICTURE_SUFFIXES
from ei.data.listed import Fault, counted
from ei.data.manifest import FAULTS_SHOWN, ManifestError, read_manifest, read_text

_IMAGE_SUFFIXES = (*PICTURE_SUFFIXES, ".npy", ".nii", ".nii.gz", ".dcm")
_OTHER_SUFFIXES = (".bmp", ".gif", ".webp", ".jp2", ".npz", ".mha", ".nrrd")
"""Images that are not read, which is to be told and not to be passed over."""
_NO_IMAGES = ("id", "patient", "split")


@dataclass(frozen=True)
class CheckReport:
    """What a manifest has, and what is wrong with it."""

    manifest: str
    modalities: tuple[str, ...]
    rows: dict[str, int]
    """Of each split; empty if there are faults, and for a manifest without labels under ''."""
    missing: dict[str, dict[str, int]]
    """Of each modality that some rows lack, how many of each split."""
    classes: tuple[str, ...]
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]

    @property
    def is_good(self) -> bool:
        return not self.faults

    def as_json(self) -> str:
        """All of it; faults and warnings as ``{"row": 3, "text": "..."}``, row 0 for the file as a whole."""
        told = {kind: [fault._asdict() for fault in getattr(self, kind)] for kind in ("faults", "warnings")}
        return json.dumps({**asdict(self), "ok": self.is_good, **told}, indent=2)

    def lines(self) -> Iterator[str]:
        """For a screen: the first faults, the first warnings, and what is there."""
        if [fault.row for fault in self.faults] == [0] and not self.warnings:
            yield str(ManifestError(Path(self.manifest), self.faults))
            return
        for kind, found in (("problem", self.faults), ("warning", self.warnings)):
            if found:
                yield f"{counted(len(found), kind)}:"
                yield from (f"  {fault}" for fault in found[:FAULTS_SHOWN])
            if (more := len(found) - FAULTS_SHOWN) > 0:
                yield f"  ... and {more} more; --json lists all"
        if self.is_good:
            rows = ", ".join(f"{name} {count}".strip() for name, count in self.rows.items())
            classes = f"; classes: {', '.join(self.classes)}" if self.classes else ""
            yield f"{self.manifest} can be used: rows: {rows}; modalities: {', '.join(self.modalities)}{classes}"
            for modality, counts in self.missing.items():
                lacking = ", ".join(f"{count} of {self.rows[split]} {split}".strip() for split, count in counts.items())
                yield f"rows without {modality}: {lacking}"


def check_manifest(path: Path, config: DataConfig, *, labelled: bool = True, cache: bool = True) -> CheckReport:
    """Read a manifest as training would, every image included.

    Args:
        path: the CSV file.
        config: as of :func:`ei.data.manifest.read_manifest`; without modalities, all columns are taken whose
            first cell names an image.
        labelled: False for a manifest to predict.
        cache: False to read files again that have not changed since they were read.

    Raises:
        ValueError: the modalities are not given, and no column names images.
    """
    try:
        if not config.modalities:
            config = replace(config, modalities=image_columns(path, besides=config.labels))
        manifest = read_manifest(path, config, labelled=labelled, cache=cache)
    except ManifestError as error:
        return CheckReport(str(path), config.modalities, {}, {}, (), error.faults, error.warnings)
    rows = dict(Counter(row.split for row in manifest.rows))
    missing, warnings = manifest.missing(), manifest.warnings
    return CheckReport(str(path), manifest.modalities, rows, missing, manifest.classes, (), warnings)


def image_columns(path: Path, besides: Sequence[str]) -> tuple[str, ...]:
    """The columns whose first cell that is not empty names an image.

    Raises:
        ManifestError: the file cannot be read.
        ValueError: there are none.
    """
    names: dict[str, bool] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
            for column, cell in row.items():
                if isinstance(cell, str) and cell.strip() and column:
                    names.setdefault(column.strip(), cell.strip().lower().endswith(_IMAGE_SUFFIXES + _OTHER_SUFFIXES))
    except csv.Error as error:
        raise ValueError(f"cannot read {path}: {error}; name the columns with --modalities to see more") from error
    if not names:
        raise ManifestError(path, [Fault(0, "has no rows")])
    found = tuple(name for name, is_image in names.items() if is_image and name not in (*_NO_IMAGES, *besides))
    if not found:
        raise ValueError(f"no column of {path} names images; name them with --modalities")
    return found
