"""What a comparison would train, and whether it can: every method, seed and fold as a cell, before anything is done."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ei.comparison.cell import Cell
from ei.comparison.methods import Method, find_methods, settings_of, stage1_settings
from ei.config import Config, ModelConfig
from ei.data.listed import counted
from ei.data.manifest import Manifest, read_manifest
from ei.models import build_model, count_trainable
from ei.models.backbone import require_weights
from ei.runs.folder import RunFolder
from ei.runs.loading import data_hashes, stage1_taken_over
from ei.runs.setup import differences, require_measurable, require_negatives, require_usable, resolved, resumes
from ei.runtime import choose_device

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Plan:
    """All cells of a comparison, before any of them is trained."""

    base: Config
    """What the methods change; its manifest may be several."""
    methods: list[Method]
    cells: list[Cell]
    split: str
    """Where methods are compared: test, or val if there are no test rows."""
    parameters: dict[str, int]
    """Trained ones, by method."""
    out: Path

    def lines(self) -> list[str]:
        """What would be done, as text."""
        width = max(len(method.name) for method in self.methods)
        lines = []
        for method in self.methods:
            changed = settings_of(method.applied(self.base), self.base)
            settings = ", ".join(f"{name}={value}" for name, value in changed.items()) or "as given"
            if method.modality is not None:
                settings = f"the first stage of {method.modality} alone"
            lines.append(f"{method.name:<{width}}  {self.parameters[method.name]:>13,}  {settings}")
        return lines + [f"{cell.state:<5}  {cell.title}  {cell.folder}" for cell in self.cells]


def make_plan(config: Config, names: Sequence[str], *, seeds: int, out: Path) -> Plan:
    """The cells of a comparison; nothing is written or trained.

    Args:
        config: What all methods share. ``data.manifest`` may be several, separated by commas: folds, whose test rows
            are of different patients.
        names: Methods (:mod:`ei.comparison.methods`).
        seeds: So many, from ``train.seed`` on.
        out: The folder of the comparison.

    Raises:
        ValueError: something of it cannot be: a method, a manifest, weights, the device, or what is in ``out``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a comparison runs in one process; start it without torchrun, or several on parts of methods")
    if not 1 <= seeds <= MOST_SEEDS:
        raise ValueError(f"seeds must be between 1 and {MOST_SEEDS}, got {seeds}")
    _require_own(out, names)
    methods = find_methods(names, config)
    manifests = _read_folds(config)
    if config.train.stage1_from and (seeds > 1 or len(manifests) > 1):
        raise ValueError(
            "stage1_from is one first stage, of one seed and one manifest; leave it out, or compare with --seeds 1 on"
            " one manifest"
        )
    split = _split_of(manifests)
    first = next(iter(manifests.values()))
    cells = []
    for fold, (path, manifest) in zip(_fold_names(manifests), manifests.items(), strict=True):
        for method in methods:
            _require_images(method, manifest, split)
        data = replace(config.data, manifest=str(path))
        hashes = data_hashes(replace(config, data=data), manifest)
        for seed in range(config.train.seed, config.train.seed + seeds):
            for method in methods:
                own = method.applied(replace(config, data=data, train=replace(config.train, seed=seed)))
                # Resolved as training does it, which may depend on the method.
                own = resolved(own, manifest)
                require_negatives(own)
                cells.append(Cell(method, fold, own, out / method.folder / fold / f"seed-{seed}", hashes))
        require_measurable(manifest, alone=any(cell.config.train.stages == "both" for cell in cells[-len(methods) :]))
    plan = Plan(
        base=replace(config, data=replace(config.data, classes=first.classes)),
        methods=methods,
        cells=cells,
        split=split,
        parameters={cell.method.name: _count(cell) for cell in cells[: len(methods)]},
        out=out,
    )
    choose_device(config.train.device)
    _require_weights(cells)
    for cell in cells:
        _require_same_settings(cell)
        _require_stage1(cell, first)
        if cell.method.modality is not None and not cell.owners(cells):
            raise ValueError(
                f"method '{cell.method.name}' is the first stage of another method, and none of the others has one with"
                f" adapter '{cell.config.model.adapter}'; add such as late:{cell.config.model.adapter}"
            )
    return plan


def _require_own(out: Path, names: Sequence[str]) -> None:
    """Raise a ValueError if the folder is a run, or holds other files than methods and nothing of a comparison."""
    require_usable(out)
    begun = any(path for pattern in ("comparison.json", "*/seed-*", "*/*/seed-*") for path in out.glob(pattern))
    of_methods = {Path(name).absolute() for name in names}
    # Names with a dot, and empty folders, are what a comparison leaves that was killed before it began.
    others = any(path.is_file() and path.absolute() not in of_methods for path in out.rglob("[!.]*"))
    if RunFolder(out).config.exists() or (others and not begun):
        raise ValueError(f"{out} is neither a comparison nor an empty folder; choose another with --out")


def _require_weights(cells: Sequence[Cell]) -> None:
    wanted = {
        (each.model.backbone, each.model.pretrained, each.model.weights, each.data.image_size)
        for cell in cells
        for each in (cell.config, cell.config.auxiliary)
        if each
    }
    for backbone, pretrained, weights, size in sorted(wanted):
        require_weights(ModelConfig(backbone=backbone, pretrained=pretrained, weights=weights), size)


def _require_stage1(cell: Cell, manifest: Manifest) -> None:
    """Raise a ValueError if the first stage that all are to take over cannot be used for this cell."""
    if cell.state == "done" or cell.method.modality is not None:
        return
    try:
        stage1_taken_over(cell.config, manifest)
    except ValueError as error:
        raise ValueError(f"method '{cell.method.name}': {error}") from error


def _require_same_settings(cell: Cell) -> None:
    """Raise a ValueError if what is in the cell's folder was begun with other settings, or on another manifest."""
    if cell.method.modality is None:
        resumes(RunFolder(cell.folder), cell.going_on)
    else:
        require_usable(cell.folder)
    if not cell.note.is_file():
        return
    note = cell.read_note()
    if cell.method.modality is not None:
        _require_same_stage1(cell, note)
    for part, what in (("manifest", cell.config.data.manifest), ("images", f"an image of {cell.config.data.manifest}")):
        if note.get(part, cell.data[part]) != cell.data[part]:
            raise ValueError(
                f"{what} is not what it was when {cell.folder} was trained; restore it, or choose another folder with"
                " --out"
            )


def _require_same_stage1(cell: Cell, note: Mapping[str, Any]) -> None:
    """Raise a ValueError if the first stage that a cell of one modality was predicted with is another than it would be.

    Such a cell has no configuration of its own. One that was handed to the whole comparison is held to its own plan.
    """
    source = RunFolder((cell.folder / str(note.get("stage1_from") or "")).resolve()).config
    if cell.config.train.stage1_from or not source.is_file():
        return
    if different := differences(stage1_settings(Config.load(source, of_run=True)), stage1_settings(cell.config)):
        raise ValueError(
            f"what is in {cell.folder} was predicted by {source.parent}, which was begun with other settings:"
            f" {'; '.join(different)}. Choose another folder with --out, or go on with the settings it has"
        )


def _read_folds(config: Config) -> dict[Path, Manifest]:
    """The manifests, which fit each other."""
    given = config.data.manifest
    paths = [Path(path.strip()) for path in given.split(",") if path.strip()]
    if not paths or os.path.isfile(given):  # Path's own raises where a list is longer than a file's name may be
        paths = [Path(given)]
    manifests = {path: read_manifest(path, config.data) for path in paths}
    first = next(iter(manifests.values()))
    whose: dict[str, Path] = {}
    split = _split_of(manifests)
    for path, manifest in manifests.items():
        if manifest.classes != first.classes:
            raise ValueError(
                f"{paths[0]} and {path} must have the same classes, got {', '.join(first.classes)} and"
                f" {', '.join(manifest.classes)}; name them all with --classes"
            )
        for row in manifest.split(split):
            if whose.setdefault(row.patient, path) != path:
                raise ValueError(
                    f"{whose[row.patient]} and {path} are folds, so their {split} rows must be of different patients,"
                    f" and both have '{row.patient}'"
                )
    if len({path.stem for path in manifests}) != len(paths):
        raise ValueError(f"manifests of a comparison must have different names, got {given}")
    return manifests


def _require_images(method: Method, manifest: Manifest, split: str) -> None:
    """Raise a ValueError if a method of one modality cannot predict all rows on which methods are compared."""
    if method.modality is None:
        return
    lacking = [row.id for row in manifest.split(split) if not row.images[method.modality]]
    if lacking:
        count = counted(len(lacking), f"{split} row")
        raise ValueError(
            f"method '{method.name}': {count} without an image of {method.modality}, such as '{lacking[0]}'; methods"
            " can be compared on the same rows only, so leave this one out"
        )


def _fold_names(manifests: dict[Path, Manifest]) -> list[str]:
    return [path.stem for path in manifests] if len(manifests) > 1 else [""]


def _split_of(manifests: dict[Path, Manifest]) -> str:
    for split in ("test", "val"):
        without = [str(path) for path, manifest in manifests.items() if not manifest.split(split)]
        if not without:
            return split
        if len(without) < len(manifests):
            raise ValueError(f"folds are compared on {split} rows, and there are none in {', '.join(without)}")
    names = ", ".join(map(str, manifests))
    raise ValueError(f"methods are compared on test rows, or else on val rows, and there are none in {names}")


def _count(cell: Cell) -> int:
    try:
        with torch.device("meta"):
            model = build_model(cell.config, len(cell.config.data.classes), modality=cell.method.modality)
    except ValueError as error:
        raise ValueError(f"method '{cell.method.name}': {error}") from error
    return count_trainable(model)["total"]
