"""A cell of a comparison: a method with one seed, and on one fold if there are several manifests.

A cell is a run, trained as :func:`ei.train` trains it; ``cell.json`` in its folder says that it is finished, and what
it took.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ei.comparison.methods import Method, stage1_key
from ei.comparison.table import COSTS
from ei.config import Config
from ei.runs.folder import CELL, RunFolder, StageFolder


@dataclass(frozen=True, eq=False)
class Cell:
    """A method with one seed, on one fold."""

    method: Method
    fold: str
    """The manifest's name; empty if there is only one."""
    config: Config
    folder: Path
    data: Mapping[str, str]
    """Hashes of the manifest and of its images, as the comparison found them."""

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.method.name, self.fold, f"seed {self.seed}")))

    @property
    def note(self) -> Path:
        return self.folder / CELL

    @property
    def state(self) -> str:
        if self.note.is_file() and RunFolder(self.folder).logits.is_file():
            return "done"
        return "begun" if RunFolder(self.folder).config.is_file() else "to do"

    @property
    def begun(self) -> Config:
        """The configuration with which it was begun, if it was."""
        path = RunFolder(self.folder).config
        return Config.load(path, of_run=True) if path.is_file() else self.config

    @property
    def going_on(self) -> Config:
        """Its configuration; what was settled when it was begun is as it was then.

        That is where its first stage comes from, and the resamplings in its own files: those of the comparison's tables
        are the comparison's.
        """
        begun = self.begun.train
        config = self.taking_stage1(begun.stage1_from)
        return replace(config, train=replace(config.train, bootstrap=begun.bootstrap))

    def follow_moved_folder(self) -> None:
        """Write down anew where its first stage comes from, if that has moved together with the comparison's folder.

        Another comparison may lie where it was. That a first stage comes from elsewhere is known by there being none
        of this comparison's own in its place.
        """
        path = RunFolder(self.folder).config
        source = self.begun.train.stage1_from if path.is_file() else ""
        if not source:
            return
        depth = 3 if self.fold else 2
        moved = self.folder.parents[depth - 1].joinpath(*Path(source).parts[-depth:])
        theirs = RunFolder(moved).config
        is_other = str(moved.resolve()) != source
        if is_other and theirs.is_file() and not Config.load(theirs, of_run=True).train.stage1_from:
            begun = self.begun
            replace(begun, train=replace(begun.train, stage1_from=str(moved.resolve()))).save(path)

    def taking_stage1(self, source: str) -> Config:
        """Its configuration with the first stage taken from there, if its method can do that."""
        if not source:
            return self.config
        try:
            return replace(self.config, train=replace(self.config.train, stage1_from=str(Path(source).resolve())))
        except ValueError:
            return self.config

    def owners(self, cells: Iterable["Cell"]) -> list["Cell"]:
        """Others whose first stage is the same."""
        key = stage1_key(self.config)
        return [
            other
            for other in cells
            if other.folder != self.folder
            and other.method.modality is None
            and other.config.train.stages == "both"
            and stage1_key(other.config) == key
        ]

    def has_stage1(self, *modalities: str) -> bool:
        """Its first stage is finished, of all modalities or of these."""
        folder = RunFolder(self.folder)
        return all(folder.stage1(name).finished.is_file() for name in modalities or self.config.data.modalities)

    def stages(self) -> list[StageFolder]:
        """All that its model went through, those that it took over included."""
        folder, alone = RunFolder(self.folder), self.method.modality
        if alone is not None:
            return [folder.stage1(alone)]
        # A first stage that was taken over may have one of auxiliary ViTs, too, and the cell need not.
        roles = (False, True) if self.config.model.aux_backbone else (False,)
        first = [folder.stage1(modality, role) for modality in self.config.data.modalities for role in roles]
        return [*first, folder.stage2]

    def read_note(self) -> dict[str, Any]:
        """What it took: manifest, images, seconds, images_per_second, epochs, memory_gib, stage1_from.

        Raises:
            ValueError: the note cannot be read, or lacks something.
        """
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            lacking = [name for name in ("manifest", *COSTS) if name not in note] if isinstance(note, dict) else ["all"]
            if lacking:
                raise ValueError(f"it lacks {', '.join(lacking)}")
            return dict(note)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {self.note}: {error}; delete it, and it is written again") from error
