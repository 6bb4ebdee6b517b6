"""What lies where in the folder of a run. Imports no torch: the report needs it, too."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_STAGES = ("stage1", "stage1-auxiliary", "stage2")
CELL = "cell.json"
"""What a comparison notes in the folder of each of its runs, and where it keeps what is no run of its own."""


@dataclass(frozen=True)
class StageFolder:
    """Where one stage writes: ``metrics.jsonl`` (a line per epoch), its best trained parameters, snapshots to go on
    from, and at the end a file ``finished``."""

    path: Path

    @property
    def history(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> Path:
        return self.path / "finished"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"


@dataclass(frozen=True)
class RunFolder:
    """Names of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.csv"

    @property
    def logits(self) -> Path:
        return self.path / "logits.npz"

    @property
    def temperature(self) -> Path:
        return self.path / "temperature.json"

    @property
    def errors(self) -> Path:
        return self.path / "errors.json"

    @property
    def cost(self) -> Path:
        return self.path / "cost.json"

    @property
    def gates(self) -> Path:
        return self.path / "gates.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def stage2(self) -> StageFolder:
        return StageFolder(self.path / "stage2")

    def stage1(self, modality: str, auxiliary: bool = False) -> StageFolder:
        """Of the primary ViT, or of an ``auxiliary`` one with a backbone of its own."""
        # A modality is a column name, and may hold what a file name may not.
        return StageFolder(self.path / ("stage1-auxiliary" if auxiliary else "stage1") / quote(modality, safe=" "))


def require_run(path: Path) -> RunFolder:
    """The folder, if it is one of a run.

    Raises:
        ValueError: it is something else; the message says what, and what to name instead.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ValueError(f"{path} is no run: {_what_else(path)}")
    return folder


def _what_else(path: Path) -> str:
    """What a folder without a configuration is."""
    if not path.is_dir():
        return "it is a file; name the folder of a run" if path.exists() else "there is no such folder"
    for run in path.absolute().parents[:3]:
        if RunFolder(run).config.is_file() and path.absolute().relative_to(run).parts[0] in _STAGES:
            return f"it is a part of one; name {run}"
    if source := _source_of_cell(path):
        return f"it holds what the first stage of another predicts; name {source}"
    if below := next(_runs_below(path), None):
        return f"it is a folder of runs; name one of them, such as {below}"
    cells = (cell for pattern in ("seed-*/", "*/seed-*/") for cell in sorted(path.glob(pattern)))
    if source := next(filter(None, map(_source_of_cell, cells)), None):
        return f"it holds what the first stages of others predict; name one of them, such as {source}"
    return f"it has no {RunFolder(path).config.name}"


def _source_of_cell(path: Path) -> Path | None:
    """Where the model of a comparison's cell lies, if that has none of its own."""
    try:
        source = json.loads((path / CELL).read_text(encoding="utf-8"))["stage1_from"]
        return (path / source).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _runs_below(path: Path) -> Iterator[Path]:
    """Runs in a folder, and those of a comparison, whose runs lie two or three folders deep."""
    for pattern in ("*/", "*/seed-*/", "*/*/seed-*/"):
        yield from (found.parent for found in sorted(path.glob(f"{pattern}config.yaml")))
