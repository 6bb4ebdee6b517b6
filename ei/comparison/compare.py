"""Several methods under one protocol: train what is not trained yet, and write one table of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ei.comparison.cell import Cell
from ei.comparison.files import write_comparison
from ei.comparison.methods import settings_of
from ei.comparison.plan import Plan, make_plan
from ei.comparison.running import run_plan
from ei.comparison.table import Failure, Result, tabulate
from ei.config import Config
from ei.runs.folder import RunFolder
from ei.runs.setup import locked
from ei.runs.stored_logits import StoredLogits


def compare(
    config: Config, methods: Sequence[str], out: str | Path, *, seeds: int = 3, share_stage1: bool = True
) -> dict[str, Any]:
    """Train every method with every seed, and compare them on the test rows (on the val rows if there are none).

    The same call goes on with a comparison that was stopped, or had more or fewer methods or seeds.

    Args:
        config: What all methods share; ``data.manifest`` may be several, separated by commas (:func:`make_plan`).
        methods: Names (:mod:`ei.comparison.methods`). The others are compared with the first.
        out: Folder to write to: METHOD/seed-K with each run (METHOD/MANIFEST/seed-K with several manifests), and
            comparison.csv, .html, .tex and .json.
        seeds: So many, from ``train.seed`` on.
        share_stage1: Train a first stage that several methods have, once.

    Returns:
        The content of comparison.json: that of :func:`ei.comparison.table.tabulate`, with ``split``, ``bootstrap``,
        ``folds``, ``protocol`` (the shared settings) and, per method, ``settings`` (what it changes).

    Raises:
        ValueError: a method, a manifest or the folder cannot be used, and nothing was trained; or no cell succeeded.
        Interrupted: Ctrl-C or SIGTERM; it was saved where training stands.
    """
    plan = make_plan(config, methods, seeds=seeds, out=Path(out))
    with locked(RunFolder(plan.out)):
        failed = run_plan(plan, share_stage1=share_stage1)
        return tabulated(plan, failed)


def tabulated(plan: Plan, failed: dict[Cell, str]) -> dict[str, Any]:
    """Write the files of a comparison from what its cells have written; returns the content of comparison.json."""
    results, failures = [], []
    for cell in plan.cells:
        where = (cell.method.name, cell.seed, cell.fold)
        try:
            if cell in failed:
                raise ValueError(failed[cell])
            results.append(Result(*where, _read_logits(cell).of_split(plan.split), cell.read_note()))
        except ValueError as error:
            failures.append(Failure(*where, str(error)))
    if not results:
        if len({each.reason for each in failures}) == 1:
            raise ValueError(f"every method failed: {failures[0].reason}")
        raise ValueError("; ".join(f"{each.method}, seed {each.seed}: {each.reason}" for each in failures))
    settings = plan.base.train
    table = tabulate(
        results,
        failures,
        plan.parameters,
        folds=list(dict.fromkeys(cell.fold for cell in plan.cells)),
        bootstrap=settings.bootstrap,
        seed=settings.seed,
    )
    for method, entry in zip(plan.methods, table["methods"], strict=True):
        entry["settings"] = settings_of(method.applied(plan.base), plan.base)
        entry["modality"] = method.modality
    folds = [fold for fold in dict.fromkeys(cell.fold for cell in plan.cells) if fold]
    about = {"split": plan.split, "bootstrap": settings.bootstrap, "folds": folds, "protocol": plan.base.to_dict()}
    content = about | table
    write_comparison(content, plan.out)
    return content


def _read_logits(cell: Cell) -> StoredLogits:
    try:
        return StoredLogits.read(RunFolder(cell.folder).logits)
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and the same command writes it again") from error
