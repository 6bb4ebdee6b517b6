"""The report of a run: its result files become one HTML page that needs nothing else.

Reads what training and evaluation wrote (files, never a model), draws it with :mod:`ei.figures`, and fills
``report.html.jinja``. Names of classes, modalities and files come from users: the template escapes them all.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ei import figures
from ei.exports import plain
from ei.figures import Picture
from ei.run_folder import RunFolder

SPLITS = ("test", "val", "train")
"""In the order of the page; the first that was evaluated gives the headline and the curves."""
SUMMARY_KEYS = ("samples", "patients", "overall", "accuracy_of", "per_class", "absent", "confusion", "curves")
OVERALL_KEYS = ("mAP", "mAUC", "mS2", "accuracy")
CLASS_KEYS = ("positives", "AP", "AUC", "S2", "counts")


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; what a run may lack is empty."""

    name: str
    config: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    stages: dict[str, list[dict[str, Any]]]  # "Stage 1, oct" -> one record per epoch
    predictions: list[dict[str, str]]
    gates: dict[str, list[dict[str, Any]]]  # "primary/oct" -> one record per adapted layer


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Args:
        run: a run folder with ``config.yaml`` and ``metrics.json``; ``predictions.csv``, the stages'
            ``metrics.jsonl`` and ``gates.json`` are shown where they exist, and said to be missing where not.

    Raises:
        ValueError: a file is missing, damaged, or does not fit; the message names it.
    """
    files = read_run(run)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = RunFolder(run).report
    path.write_text(templates.get_template("report.html.jinja").render(_page(files)), encoding="utf-8")
    return path


def read_run(run: Path) -> RunFiles:
    """The result files of a run folder, checked as far as the report relies on them.

    Raises:
        ValueError: a file is missing, damaged, or does not fit; the message names it.
    """
    folder = RunFolder(run)
    metrics = _read_metrics(folder.metrics)
    stages = {f"Stage 1, {name}": folder.stage1(name) for name in metrics["modalities"]} | {"Stage 2": folder.stage2}
    return RunFiles(
        name=run.resolve().name,
        config=_read_config(folder.config),
        metrics=metrics,
        stages={title: _read_epochs(stage.history) for title, stage in stages.items() if stage.history.exists()},
        predictions=_read_predictions(folder.predictions, metrics) if folder.predictions.exists() else [],
        gates=_read_gates(folder.gates) if folder.gates.exists() else {},
    )


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        config = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise ValueError(f"{path} must hold sections of 'name: value' lines")
    return config


def _read_metrics(path: Path) -> dict[str, Any]:
    metrics = _json(_text(path), str(path))
    _require_keys(metrics, ("classes", "modalities", "multi_label", "splits"), str(path))
    if not metrics["splits"]:
        raise ValueError(f"{path}: splits must hold at least one evaluated split")
    for split, results in metrics["splits"].items():
        _require_keys(results, ("fused", "modalities"), f"{path}, {split}")
        subsets = {f"'{name}'": summary for name, summary in results.get("subsets", {}).items() if summary}
        for source, summary in {**_sources(results), **subsets}.items():
            where = f"{path}, {source} of {split}"
            _require_keys(summary, SUMMARY_KEYS, where)
            _require_keys(summary["overall"], OVERALL_KEYS, where)
            _require_keys(summary["per_class"], metrics["classes"], where)
            for name, entry in summary["per_class"].items():
                _require_keys(entry, CLASS_KEYS, f"{where}, class {name},")
    return metrics


def _read_epochs(path: Path) -> list[dict[str, Any]]:
    epochs = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            epochs.append(_json(line, f"{path}, line {number},"))
            _require_keys(epochs[-1], ("epoch", "loss", "val"), f"{path}, line {number},")
    return epochs


def _read_predictions(path: Path, metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    try:
        reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
        columns, *cells = [[plain(cell) for cell in line] for line in reader if line] or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error
    _require_keys(dict.fromkeys(columns), ("split", "label"), str(path))
    rows = []
    for number, line in enumerate(cells, start=1):
        where = f"{path}, sample {number},"
        if len(line) != len(columns):
            raise ValueError(f"{where} must have {len(columns)} cells, as the header")
        row = dict(zip(columns, line, strict=True))
        rows.append(row)
        if ";".join(_labels(row, metrics)) != row["label"]:
            raise ValueError(f"{where} has a label that is no class of metrics.json: {row['label']!r}")
        for column in columns:
            if column.startswith("weight:") and not _is_number(row[column]):
                raise ValueError(f"{where} must have a number as {column}, got {row[column]!r}")
    return rows


def _labels(row: Mapping[str, str], metrics: Mapping[str, Any]) -> list[str]:
    """The classes of a sample; several are separated by semicolons, which a name may hold too."""
    if metrics["multi_label"]:
        return [name for name in metrics["classes"] if f";{name};" in f";{row['label']};"]
    return [name for name in metrics["classes"] if name == row["label"]]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _read_gates(path: Path) -> dict[str, list[dict[str, Any]]]:
    gates = _json(_text(path), str(path))
    for part, layers in gates.items():
        for layer in layers:
            _require_keys(layer, ("layer", "gates", "bypass", "entropy", "effective_rank"), f"{path}, {part}")
    return gates


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(values).__name__}")
    return values


def _require_keys(values: Any, keys: Sequence[str], where: str) -> None:
    missing = list(keys) if not isinstance(values, Mapping) else [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _page(files: RunFiles) -> dict[str, Any]:
    """Everything that the template names."""
    splits = files.metrics["splits"]
    order = _in_order(splits)
    headline, sources = order[0], _sources(splits[order[0]])
    return {
        "name": files.name,
        "config": files.config,
        "classes": files.metrics["classes"],
        "modalities": files.metrics["modalities"],
        "multi_label": files.metrics["multi_label"],
        "headline": headline,
        "chance": _chance(sources["fused"]),
        "splits": {split: _split_view(split, splits[split]) for split in order},
        "curves": {name: _curve_pictures(name, sources) for name in sources["fused"]["curves"]},
        "stages": {
            stage: [figures.loss_curves(epochs, stage), figures.validation_curves(epochs, stage)]
            for stage, epochs in files.stages.items()
        },
        "has_predictions": bool(files.predictions),
        "weights": _weight_pictures(files),
        "gates": {part: _gate_view(part, layers, files.config) for part, layers in files.gates.items() if layers},
    }


def _in_order(splits: Iterable[str]) -> list[str]:
    """Each split once; those that SPLITS does not know come last."""
    return sorted(dict.fromkeys(splits), key=lambda split: (*SPLITS, split).index(split))


def _sources(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Who predicts: the whole model first, then each modality."""
    return {"fused": results["fused"], **results["modalities"]}


def _chance(summary: Mapping[str, Any]) -> float | None:
    """The mAP to expect of a random order: the mean share of the classes that have both labels."""
    present = [entry for name, entry in summary["per_class"].items() if name not in summary["absent"]]
    return sum(entry["positives"] for entry in present) / len(present) / summary["samples"] if present else None


def _split_view(split: str, results: Mapping[str, Any]) -> dict[str, Any]:
    fused = results["fused"]
    matrix = fused["confusion"]
    return {
        "fused": fused,
        "sources": _sources(results),
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
            members = [row for row in rows if name in _labels(row, files.metrics)]
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
