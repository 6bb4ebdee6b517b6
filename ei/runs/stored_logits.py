"""Raw logits of an evaluation on disk, so that two runs can be compared exactly. Imports no torch.

Probabilities would not do: one softmax ranks the samples of a class differently than their logits do, and six
digits make ties.
"""

import io
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StoredLogits:
    """What was predicted for N samples by S sources: the fused prediction and each modality's own."""

    classes: NDArray[np.str_]  # (C,)
    sources: NDArray[np.str_]  # (S,), "fused" first
    ids: NDArray[np.str_]  # (N,)
    patients: NDArray[np.str_]  # (N,)
    splits: NDArray[np.str_]  # (N,)
    labels: NDArray[np.int64]  # (N,) class indices, or (N, C) of 0 and 1
    logits: NDArray[np.float32]  # (S, N, C), before any temperature; nan where a sample has no such modality

    def as_bytes(self) -> bytes:
        """The content of an ``.npz`` file; the same values give the same bytes."""
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **vars(self))
        return stream.getvalue()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`as_bytes` gave.

        Raises:
            ValueError: the file is missing or damaged, or its arrays do not fit each other; the message names it.
        """
        names = [item.name for item in fields(cls)]
        try:
            # Of bytes, because numpy leaves a file open that is no archive.
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays: dict[str, NDArray[Any]] = {name: file[name] for name in names}
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            # RuntimeError: one flipped bit, and zipfile takes it for encrypted or for compressed in an unknown way.
            raise ValueError(f"cannot read {path}: {error}") from error
        stored = cls(**arrays)
        sizes = (len(stored.sources), len(stored.ids), len(stored.classes))
        columns = (stored.patients, stored.splits, stored.labels)
        if stored.logits.shape != sizes or any(len(column) != sizes[1] for column in columns):
            raise ValueError(f"{path} is damaged: its arrays do not fit each other")
        return stored

    def of_split(self, split: str) -> Self:
        """The samples of one split, sorted by id."""
        rows = np.flatnonzero(self.splits == split)
        rows = rows[np.argsort(self.ids[rows], kind="stable")]
        return replace(
            self,
            ids=self.ids[rows],
            patients=self.patients[rows],
            splits=self.splits[rows],
            labels=self.labels[rows],
            logits=self.logits[:, rows],
        )
