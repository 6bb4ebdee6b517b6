"""The cells of a comparison, trained one after the other; one that was stopped goes on where it stands."""

import gc
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ei.comparison.cell import Cell
from ei.comparison.plan import Plan
from ei.data.manifest import read_manifest
from ei.evaluation.evaluate import evaluate
from ei.evaluation.inference import predict_rows
from ei.evaluation.predictions import Predictions, stored_logits
from ei.evaluation.tables import write_json
from ei.interrupts import ElsewhereError, Interrupted
from ei.processes import Processes
from ei.progress import say
from ei.runs.files import read_epochs, stage_cost
from ei.runs.folder import RunFolder, StageFolder
from ei.runs.loading import changed_data, load
from ei.runtime import choose_device
from ei.training import train
from mor.files import write_atomically


def run_plan(plan: Plan, *, share_stage1: bool = True) -> dict[Cell, str]:
    """Train every cell that is not done; what goes wrong in one is said, and the others go on.

    Args:
        plan: Of :func:`ei.comparison.plan.make_plan`.
        share_stage1: Cells of one seed whose first stage would be the same to the last bit take it from the first of
            them, instead of training it again.

    Returns:
        Cells that failed, and why.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; it was saved where training stands.
    """
    failed = {}
    for cell in plan.cells:
        cell.follow_moved_folder()
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
    config = cell.going_on
    there = (other for other in cell.owners(cells) if other.has_stage1() and not other.begun.train.stage1_from)
    if cell.state == "to do" and not config.train.stage1_from and (other := next(there, None)):
        config = cell.taking_stage1(str(other.folder))
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
    owner = next((other for other in cell.owners(plan.cells) if other.has_stage1(modality)), None)
    if owner is None:
        names = ", ".join(other.title for other in cell.owners(plan.cells))
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
    _note(cell, Path(owner.begun.train.stage1_from or owner.folder))


def _note(cell: Cell, source: Path | None) -> None:
    """Write what the cell took, with its first stage, whoever trained that."""
    stages = [_trained_in(stage, cell.folder, source) for stage in cell.stages()]
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


def _trained_in(stage: StageFolder, folder: Path, source: Path | None) -> StageFolder:
    """The stage, or that of ``source`` from which it was taken."""
    if stage.history.is_file() or source is None:
        return stage
    return StageFolder(source / stage.path.relative_to(folder))


def _require_same_data(cell: Cell) -> None:
    """Raise a ValueError if the manifest or an image has changed since the comparison was begun or gone on with."""
    manifest = read_manifest(cell.config.data.manifest, cell.config.data)
    if changed := changed_data(cell.data, cell.config, manifest):
        raise ValueError(f"{changed} has changed while the comparison ran; restore it, and start the comparison again")


def _forget_the_last(cell: Cell) -> None:
    """So that this cell neither computes in what another has left, nor is charged for it."""
    if cell.config.train.compile != "off":
        torch.compiler.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
