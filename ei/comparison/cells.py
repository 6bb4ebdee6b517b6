"""The cells of a comparison: every method with every seed, and on every fold if there are several manifests.

A cell is a run, trained as :func:`ei.train` trains it, so one that was stopped goes on where it stands, and one that is
finished is left alone. ``cell.json`` in its folder says that it is finished, and what it took.
"""

import gc
import json
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ei.comparison.methods import Method, find_methods, settings_of, stage1_key
from ei.comparison.table import COSTS
from ei.config import Config
from ei.data.listed import counted
from ei.data.manifest import Manifest, read_manifest
from ei.evaluation.evaluate import evaluate
from ei.evaluation.inference import predict_rows
from ei.evaluation.predictions import Predictions, stored_logits
from ei.evaluation.tables import write_json
from ei.interrupts import ElsewhereError, Interrupted
from ei.models import build_model, count_trainable
from ei.processes import Processes
from ei.progress import say
from ei.runs.files import read_epochs, stage_cost
from ei.runs.folder import RunFolder, StageFolder
from ei.runs.loading import changed_data, data_hashes, load
from ei.runs.setup import require_usable, resolved, resumes
from ei.runtime import choose_device
from ei.training import train
from mor.files import write_atomically


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
        return self.folder / "cell.json"

    @property
    def state(self) -> str:
        if self.note.is_file() and RunFolder(self.folder).logits.is_file():
            return "done"
        return "begun" if RunFolder(self.folder).config.is_file() else "to do"


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
        ValueError: something of it cannot be: a method, a manifest, or what is in ``out``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a comparison runs in one process; start it without torchrun, or several on parts of methods")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
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
                cells.append(Cell(method, fold, own, out / method.folder / fold / f"seed-{seed}", hashes))
    plan = Plan(
        base=replace(config, data=replace(config.data, classes=first.classes)),
        methods=methods,
        cells=cells,
        split=split,
        parameters={cell.method.name: _count(cell) for cell in cells[: len(methods)]},
        out=out,
    )
    for cell in cells:
        _require_same_settings(cell)
        if cell.method.modality is not None and not _owners(cell, cells):
            raise ValueError(
                f"method '{cell.method.name}' is the first stage of another method, and none of the others has one with"
                f" adapter '{cell.config.model.adapter}'; add such as late:{cell.config.model.adapter}"
            )
    return plan


def run_plan(plan: Plan, *, share_stage1: bool = True) -> dict[Cell, str]:
    """Train every cell that is not done; what goes wrong in one is said, and the others go on.

    Args:
        plan: Of :func:`make_plan`.
        share_stage1: Cells of one seed whose first stage would be the same to the last bit take it from the first of
            them, instead of training it again.

    Returns:
        Cells that failed, and why.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; it was saved where training stands.
    """
    failed = {}
    # Models of one modality are the first stage of others, which come first.
    order = sorted(plan.cells, key=lambda cell: cell.method.modality is not None)
    for number, cell in enumerate(order, start=1):
        if cell.state == "done":
            continue
        say(f"{number}/{len(order)}: {cell.title}")
        _forget_the_last(cell)
        try:
            _require_same_data(cell)
            if cell.method.modality is None:
                _train(cell, plan.cells if share_stage1 else [])
            else:
                _evaluate_alone(cell, plan)
        except (Interrupted, ElsewhereError):
            raise
        except Exception as error:
            if "EI_TRACEBACK" in os.environ:
                traceback.print_exc()
            failed[cell] = " ".join(str(error).split()) or type(error).__name__
            say(f"{cell.title} failed: {failed[cell]}")
    return failed


def _train(cell: Cell, cells: Sequence[Cell]) -> None:
    config = _with_source(cell, _as_begun(cell).train.stage1_from)
    there = (other for other in _owners(cell, cells) if _has_stage1(other) and not _as_begun(other).train.stage1_from)
    if cell.state == "to do" and not config.train.stage1_from and (other := next(there, None)):
        config = _with_source(cell, str(other.folder))
    try:
        train(config, cell.folder)
    except ValueError as error:
        if config == cell.config or cell.state != "to do":
            raise
        say(f"{cell.title}: {error}. Its first stage is trained here")
        config = cell.config
        train(config, cell.folder)
    if not RunFolder(cell.folder).logits.is_file():  # deleted since
        evaluate(cell.folder)
    _note(cell, Path(config.train.stage1_from) if config.train.stage1_from else None)


def _evaluate_alone(cell: Cell, plan: Plan) -> None:
    """What the first stage of another cell predicts."""
    modality = cell.method.modality
    assert modality is not None
    owner = next((other for other in _owners(cell, plan.cells) if _has_stage1(other, modality)), None)
    if owner is None:
        names = ", ".join(other.title for other in _owners(cell, plan.cells))
        raise ValueError(f"no first stage of {modality} was trained by {names}")
    model, config = load(owner.folder, modality)
    manifest = read_manifest(config.data.manifest, config.data, classes=config.data.classes)
    rows = manifest.split(plan.split)
    processes = Processes.join(config.train.device)
    found = predict_rows(model.to(processes.device), rows, config, processes=processes, what=f"evaluate {plan.split}")
    if not np.isfinite(found.logits).all():
        raise ValueError(f"the first stage of {modality} in {owner.folder} gives logits that are not finite")
    stored = stored_logits({plan.split: Predictions(found.logits, {}, None)}, {plan.split: rows}, manifest)
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(RunFolder(cell.folder).logits, stored.as_bytes())
    _note(cell, Path(_as_begun(owner).train.stage1_from or owner.folder))


def _note(cell: Cell, source: Path | None) -> None:
    """Write what the cell took, with its first stage, whoever trained that."""
    stages = [_trained_in(stage, cell.folder, source) for stage in _stages(cell)]
    costs = [stage_cost(read_epochs(stage.history)) for stage in stages if stage.history.is_file()]
    # On a CPU it is the process's memory, which that of earlier cells is part of.
    on_gpu = choose_device(cell.config.train.device).type == "cuda"
    memory = [cost["memory_gib"] for cost in costs if cost["memory_gib"]]
    content = {
        **cell.data,
        "seconds": sum(cost["seconds"] for cost in costs),
        "images_per_second": costs[-1]["images_per_second"] if costs else None,
        "epochs": costs[-1]["epochs"] if costs else None,
        "memory_gib": max(memory) if memory and on_gpu else None,
        "stage1_from": os.path.relpath(source, cell.folder) if source else None,
    }
    write_json(cell.note, content)


def _stages(cell: Cell) -> list[StageFolder]:
    folder, alone = RunFolder(cell.folder), cell.method.modality
    if alone is not None:
        return [folder.stage1(alone)]
    # A first stage that was taken over may have one of auxiliary ViTs, too, and the cell need not.
    roles = (False, True) if cell.config.model.aux_backbone else (False,)
    first = [folder.stage1(modality, role) for modality in cell.config.data.modalities for role in roles]
    return [*first, folder.stage2]


def _trained_in(stage: StageFolder, folder: Path, source: Path | None) -> StageFolder:
    """The stage, or that of ``source`` from which it was taken."""
    if stage.history.is_file() or source is None:
        return stage
    return StageFolder(source / stage.path.relative_to(folder))


def _owners(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Other cells whose first stage is the same."""
    key = stage1_key(cell.config)
    return [
        other
        for other in cells
        if other.folder != cell.folder
        and other.method.modality is None
        and other.config.train.stages == "both"
        and stage1_key(other.config) == key
    ]


def _has_stage1(cell: Cell, *modalities: str) -> bool:
    folder = RunFolder(cell.folder)
    return all(folder.stage1(name).finished.is_file() for name in modalities or cell.config.data.modalities)


def _with_source(cell: Cell, source: str) -> Config:
    """The cell's configuration with its first stage taken from there, if its method can do that."""
    if not source:
        return cell.config
    try:
        return replace(cell.config, train=replace(cell.config.train, stage1_from=str(Path(source).resolve())))
    except ValueError:
        return cell.config


def _as_begun(cell: Cell) -> Config:
    """The configuration with which the cell was begun, if it was; where stage 1 comes from is settled then."""
    path = RunFolder(cell.folder).config
    return Config.load(path, of_run=True) if path.is_file() else cell.config


def _require_same_settings(cell: Cell) -> None:
    """Raise a ValueError if what is in the cell's folder was begun with other settings, or on another manifest."""
    if cell.method.modality is None:
        resumes(RunFolder(cell.folder), _with_source(cell, _as_begun(cell).train.stage1_from))
    else:
        require_usable(cell.folder)
    if not cell.note.is_file():
        return
    note = read_note(cell)
    for part, what in (("manifest", cell.config.data.manifest), ("images", f"an image of {cell.config.data.manifest}")):
        if note.get(part, cell.data[part]) != cell.data[part]:
            raise ValueError(
                f"{what} is not what it was when {cell.folder} was trained; restore it, or choose another folder with"
                " --out"
            )


def _require_same_data(cell: Cell) -> None:
    """Raise a ValueError if the manifest or an image has changed since the comparison was begun or gone on with."""
    manifest = read_manifest(cell.config.data.manifest, cell.config.data)
    if changed := changed_data(cell.data, cell.config, manifest):
        raise ValueError(f"{changed} has changed while the comparison ran; restore it, and start the comparison again")


def read_note(cell: Cell) -> dict[str, Any]:
    """What a finished cell took: manifest, images, seconds, images_per_second, epochs, memory_gib, stage1_from."""
    try:
        note = json.loads(cell.note.read_text(encoding="utf-8"))
        lacking = [name for name in ("manifest", *COSTS) if name not in note] if isinstance(note, dict) else ["all"]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        return dict(note)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {cell.note}: {error}; delete it, and it is written again") from error


def _read_folds(config: Config) -> dict[Path, Manifest]:
    """The manifests, which fit each other."""
    given = config.data.manifest
    paths = [Path(given)] if Path(given).is_file() else [Path(path.strip()) for path in given.split(",")]
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


def _forget_the_last(cell: Cell) -> None:
    """So that this cell neither computes in what another has left, nor is charged for it."""
    if cell.config.train.compile != "off":
        torch.compiler.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
