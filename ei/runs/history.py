"""The history of a stage: a line of JSON per epoch, and, if wanted, the same for TensorBoard."""

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ei.runs.folder import StageFolder
from mor.files import write_atomically


def require_tensorboard() -> None:
    """Raise a ValueError if TensorBoard is not installed: before training, not after the first epoch."""
    if find_spec("tensorboard") is None:
        raise ValueError("tensorboard must be off where the package is not installed: pip install tensorboard")


class History:
    """Appends to ``metrics.jsonl``, and writes event files if ``tensorboard``.

    Args:
        folder: Of the stage.
        tensorboard: Write ``tensorboard/`` in the folder, too.
        records: So many lines count; those after them were written after the snapshot from which the stage goes on.
    """

    def __init__(self, folder: StageFolder, *, tensorboard: bool, records: int) -> None:
        self.file = folder.history
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").splitlines(True) if self.file.exists() else []
        write_atomically(self.file, "".join(lines[:records]).encode())
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder.tensorboard), purge_step=records)

    def add(self, record: Mapping[str, Any]) -> None:
        """One epoch."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self.events is not None:
            for name, value in _scalars(record):
                self.events.add_scalar(name, value, record["epoch"])
            self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers by name, those of a group as ``group/name``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _scalars(value))
        elif value is not None and name != "epoch":
            yield name, value
