"""The report of a run: its result files become one HTML page that needs nothing else.

Reads what training and evaluation wrote (files, never a model), draws it with :mod:`ei.report.figures`, and fills
``page.html.jinja``. Names of classes, modalities and files come from users: the template escapes them all.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ei.config import TrainConfig
from ei.exports import html_page
from ei.metrics.calibration import doubtful_temperatures
from ei.report import figures
from ei.report.against import compare_runs
from ei.report.error_cards import error_cards
from ei.report.figures import Picture
from ei.runs.files import RunFiles, read_run, sources_of, stage_cost, true_classes
from ei.runs.folder import RunFolder

SPLITS = ("test", "val", "train")
"""In the order of the page; the first that was evaluated gives the headline and the curves."""


def write_report(run: Path, against: Path | None = None) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Args:
        run: a run folder with ``config.yaml`` and ``metrics.json``; what else evaluation writes, and the stages'
            ``metrics.jsonl``, are shown where they exist, and said to be missing where not.
        against: another run to compare it with, evaluated on the same samples.

    Raises:
        ValueError: a file is missing, damaged, or does not fit; the message names it. Or the runs cannot be compared.
    """
    files = read_run(run)
    path = RunFolder(run).report
    page = _page(files) | {"comparison": _comparison_view(files, run, against)}
    text = html_page(Path(__file__).parent / "page.html.jinja", page)
    # A run with a report counts as finished, so there must never be half of one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _page(files: RunFiles) -> dict[str, Any]:
    """Everything that the template names."""
    splits = files.metrics["splits"]
    order = _in_order(splits)
    headline, sources = order[0], sources_of(splits[order[0]])
    return {
        "name": files.name,
        "config": files.config,
        "classes": files.metrics["classes"],
        "modalities": files.metrics["modalities"],
        "multi_label": files.metrics["multi_label"],
        "headline": headline,
        "chance": _chance(sources["fused"]),
        "splits": {split: _split_view(split, splits[split]) for split in order},
        "calibrations": _calibration_pictures(sources, files.metrics["multi_label"]),
        "temperatures": files.metrics.get("temperatures") or {},
        "doubtful_temperatures": doubtful_temperatures(files.metrics.get("temperatures") or {}),
        "errors": error_cards(files),
        "errors_split": files.errors.get("split"),
        "curves": {name: _curve_pictures(name, sources) for name in sources["fused"]["curves"]},
        "stages": {
            stage: [figures.loss_curves(epochs, stage), figures.validation_curves(epochs, stage)]
            for stage, epochs in files.stages.items()
        },
        "has_predictions": bool(files.predictions),
        "weights": _weight_pictures(files),
        "cost": files.cost,
        "checkpoint_bytes": files.checkpoint_bytes,
        "stage_costs": {stage: stage_cost(epochs) for stage, epochs in files.stages.items()},
        "gates": {part: _gate_view(part, layers, files.config) for part, layers in files.gates.items() if layers},
    }


def _in_order(splits: Iterable[str]) -> list[str]:
    """Each split once; those that SPLITS does not know come last."""
    return sorted(dict.fromkeys(splits), key=lambda split: (*SPLITS, split).index(split))


def _chance(summary: Mapping[str, Any]) -> float | None:
    """The mAP to expect of a random order: the mean share of the classes that have both labels."""
    present = [entry for name, entry in summary["per_class"].items() if name not in summary["absent"]]
    return sum(entry["positives"] for entry in present) / len(present) / summary["samples"] if present else None


def _split_view(split: str, results: Mapping[str, Any]) -> dict[str, Any]:
    fused = results["fused"]
    matrix = fused["confusion"]
    return {
        "fused": fused,
        "sources": sources_of(results),
        "subsets": results.get("subsets", {}),
        "confusion": figures.confusion(matrix, list(fused["per_class"]), split) if matrix else None,
    }


def _curve_pictures(name: str, sources: Mapping[str, Mapping[str, Any]]) -> list[Picture]:
    # A modality may be missing where the class has both labels.
    sources = {source: summary for source, summary in sources.items() if name in summary["curves"]}
    curves = {source: summary["curves"][name] for source, summary in sources.items()}
    entries = {source: summary["per_class"][name] for source, summary in sources.items()}
    prevalence = entries["fused"]["positives"] / sources["fused"]["samples"]
    return [
        figures.roc(name, curves, {source: entry["AUC"]["value"] for source, entry in entries.items()}),
        figures.precision_recall(
            name, curves, {source: entry["AP"]["value"] for source, entry in entries.items()}, prevalence
        ),
    ]


def _calibration_pictures(sources: Mapping[str, Mapping[str, Any]], multi_label: bool) -> dict[str, Picture]:
    """Caption -> picture: of every source, or with several labels of every class of the fused prediction."""
    pictures = {}
    for source, summary in sources.items():
        if "calibration" not in summary or (multi_label and source != "fused"):
            continue
        for name, part in summary["calibration"]["of"].items():
            title = name if multi_label else source
            without = summary["uncalibrated"]["of"][name]["reliability"] if "uncalibrated" in summary else None
            caption = f"{title}: ECE {part['ECE']['value']:.3f}"
            pictures[caption] = figures.reliability(title, part["reliability"], without)
    return pictures


def _comparison_view(files: RunFiles, run: Path, against: Path | None) -> dict[str, Any] | None:
    if against is None:
        return None
    settings = files.config.get("train", {})
    splits = compare_runs(
        run,
        against,
        bootstrap=settings.get("bootstrap", TrainConfig.bootstrap),
        seed=settings.get("seed", TrainConfig.seed),
    )
    name = against.resolve().name
    return {"other": name if name != files.name else str(against), "splits": splits}


def _weight_pictures(files: RunFiles) -> dict[str, Picture]:
    """One picture per split, with a bar for all of its samples and one for each true class."""
    modalities, classes = files.metrics["modalities"], files.metrics["classes"]
    if not files.predictions or any(f"weight:{modality}" not in files.predictions[0] for modality in modalities):
        return {}
    pictures = {}
    for split in _in_order(row["split"] for row in files.predictions):
        rows = [row for row in files.predictions if row["split"] == split]
        groups = {f"all ({len(rows)})": _mean_weights(rows, modalities)}
        for name in classes:
            members = [row for row in rows if name in true_classes(row, files.metrics)]
            if members:
                groups[f"{name} ({len(members)})"] = _mean_weights(members, modalities)
        pictures[split] = figures.weight_bars(groups, split)
    return pictures


def _mean_weights(rows: Sequence[Mapping[str, str]], modalities: Sequence[str]) -> dict[str, float]:
    return {modality: sum(float(row[f"weight:{modality}"]) for row in rows) / len(rows) for modality in modalities}


def _gate_view(
    part: str, layers: Sequence[Mapping[str, Any]], config: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    experts = max(len(layer["gates"]) for layer in layers)
    ranks = config.get("model", {}).get("ranks") or []
    names = [f"rank {rank}" for rank in ranks] if len(ranks) == experts else []
    return {
        "picture": figures.gate_map(part, layers, names or [str(number + 1) for number in range(experts)]),
        "entropy": sum(layer["entropy"] for layer in layers) / len(layers),
        "effective_rank": sum(layer["effective_rank"] for layer in layers) / len(layers),
    }
