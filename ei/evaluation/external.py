"""Another table than the run's own, to evaluate a finished model on: labelled, and of patients that it never saw."""

from dataclasses import replace
from pathlib import Path

from ei.config import Config
from ei.data.manifest import Manifest, ManifestError, Row, read_manifest
from ei.progress import say
from ei.runs.folder import RunFolder
from ei.runs.loading import best_checkpoint, changed_data
from ei.runs.setup import require_positions, tell_warnings

EXTERNAL = "external"
"""The split of all of its rows; a split column is not looked at."""
_SHOWN = 8


def read_external(path: str | Path, folder: RunFolder, config: Config) -> tuple[Manifest, Config]:
    """The table, and the run's configuration with it in place of the run's own.

    Args:
        path: CSV with the run's columns of modalities and labels, and ``id``.
        folder: Of the run.
        config: Of the run.

    Raises:
        ValueError: the table has faults, or rows of patients, or with images, that the model was trained or chosen on.
    """
    data = replace(config.data, manifest=str(Path(path).resolve()), allow_missing=config.data.knows_missing)
    table = read_manifest(path, data, classes=data.classes, split=EXTERNAL)
    tell_warnings(table, path)
    require_positions(config, table)
    seen = _rows_seen(folder, config)
    for names, are, way_out in (
        (_patients, "are of patients", ", or rename patients that are others of the same name"),
        (_images, "have images", ""),
    ):
        known = {name for row in seen for name in names(row)}
        if rows := [row.number for row in table.rows if known & names(row)]:
            more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
            raise ValueError(
                f"{path}: rows {', '.join(map(str, rows[:_SHOWN]))}{more} {are} that {folder.path} was trained or"
                f" chosen on, which would flatter it; leave them out{way_out}"
            )
    return table, replace(config, data=data)


def _rows_seen(folder: RunFolder, config: Config) -> list[Row]:
    """The rows that the run was trained or chosen on, as far as that can be found out; if not, it is said."""
    own = config.data.manifest
    try:
        manifest = read_manifest(own, config.data, classes=config.data.classes)
    except ManifestError:
        say(f"note: {own} is gone or has faults, so whether {folder.path} was trained on these patients is not known")
        return []
    if changed := changed_data(best_checkpoint(folder).notes, config, manifest):
        say(f"note: {changed} is not what it was, so {folder.path} may have been trained on other patients than it has")
    return manifest.split("train") + manifest.split("val")


def _patients(row: Row) -> set[str]:
    return {row.patient}


def _images(row: Row) -> set[str]:
    return {checked.sha256 for checked in row.checked.values()}
