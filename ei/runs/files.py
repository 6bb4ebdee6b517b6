"""The result files of a run, read and checked as far as the report relies on them. Imports no torch."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ei.config import TWO_STAGES, ModelConfig
from ei.exports import plain
from ei.runs.folder import require_run

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
    errors: dict[str, Any]  # "split", and "samples": those with the highest loss, worst first
    cost: dict[str, Any]  # "trained" parameters by part, "frozen" ones, "flops"
    checkpoint_bytes: int | None


def read_run(run: Path) -> RunFiles:
    """The result files of a run folder, checked as far as the report relies on them.

    Raises:
        ValueError: a file is missing, damaged, or does not fit; the message names it.
    """
    folder = require_run(run)
    if not folder.metrics.is_file():
        raise ValueError(
            f"{run} has not been evaluated yet ({folder.metrics} is missing); 'ei evaluate {run}' does it, with"
            " --manifest and --out if its own manifest has neither val nor test rows"
        )
    metrics = _read_metrics(folder.metrics)
    stages = {f"Stage 1, {name}": folder.stage1(name) for name in metrics["modalities"]}
    stages |= {f"Stage 1, auxiliary {name}": folder.stage1(name, auxiliary=True) for name in metrics["modalities"]}
    config = _read_config(folder.config)
    has_two = config.get("model", {}).get("fusion", ModelConfig.fusion) in TWO_STAGES
    stages |= {"Stage 2" if has_two else "Training": folder.stage2}
    return RunFiles(
        name=run.resolve().name,
        config=config,
        metrics=metrics,
        stages={title: read_epochs(stage.history) for title, stage in stages.items() if stage.history.exists()},
        predictions=_read_predictions(folder.predictions, metrics) if folder.predictions.exists() else [],
        gates=_read_gates(folder.gates) if folder.gates.exists() else {},
        errors=_read_errors(folder.errors, metrics) if folder.errors.exists() else {},
        cost=_read_cost(folder.cost) if folder.cost.exists() else {},
        checkpoint_bytes=folder.stage2.best.stat().st_size if folder.stage2.best.exists() else None,
    )


def sources_of(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Who predicts: the whole model first, then each modality."""
    return {"fused": results["fused"], **results["modalities"]}


def true_classes(row: Mapping[str, str], metrics: Mapping[str, Any]) -> list[str]:
    """The classes of a sample; several are separated by semicolons, which a name may hold too."""
    if metrics["multi_label"]:
        return [name for name in metrics["classes"] if f";{name};" in f";{row['label']};"]
    return [name for name in metrics["classes"] if name == row["label"]]


def stage_cost(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a stage took, from its records: epochs and which was the best, seconds of training, images/s, memory."""
    scores = [(epoch["val"] or {}).get("mAP") for epoch in epochs]
    known = [score for score in scores if score is not None]
    best = epochs[scores.index(max(known)) if known else -1]["epoch"] if epochs else None
    timed = [epoch for epoch in epochs if epoch.get("images_per_second")]
    seconds = sum(epoch["seconds"] for epoch in timed)
    images = sum(epoch["images_per_second"] * epoch["seconds"] for epoch in timed)
    return {
        "epochs": epochs[-1]["epoch"] if epochs else 0,
        "best": best,
        "seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        "memory_gib": max((epoch.get("memory_gib") or 0 for epoch in epochs), default=0) or None,
    }


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
        for source, summary in {**sources_of(results), **subsets}.items():
            where = f"{path}, {source} of {split}"
            _require_keys(summary, SUMMARY_KEYS, where)
            _require_keys(summary["overall"], OVERALL_KEYS, where)
            _require_keys(summary["per_class"], metrics["classes"], where)
            for block in ("calibration", "uncalibrated"):
                if block in summary:
                    _require_keys(summary[block], ("ECE", "Brier", "log_loss", "of"), f"{where}, {block},")
            for name, entry in summary["per_class"].items():
                _require_keys(entry, CLASS_KEYS, f"{where}, class {name},")
    return metrics


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """The records of a stage's ``metrics.jsonl``; a ValueError if the file is missing or damaged."""
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
        if ";".join(true_classes(row, metrics)) != row["label"]:
            raise ValueError(f"{where} has a label that is no class of metrics.json: {row['label']!r}")
        for column in columns:
            if column.startswith("weight:") and not _is_number(row[column]):
                raise ValueError(f"{where} must have a number as {column}, got {row[column]!r}")
    return rows


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


def _read_errors(path: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    errors = _json(_text(path), str(path))
    _require_keys(errors, ("split", "samples"), str(path))
    for number, sample in enumerate(errors["samples"], start=1):
        where = f"{path}, sample {number},"
        _require_keys(sample, ("id", "patient", "labels", "loss", "probabilities", "files"), where)
        _require_keys(sample["probabilities"], ("fused",), where)
        if any(len(probs) != len(metrics["classes"]) for probs in sample["probabilities"].values() if probs):
            raise ValueError(f"{where} must have a probability for each class of metrics.json")
    return errors


def _read_cost(path: Path) -> dict[str, Any]:
    cost = _json(_text(path), str(path))
    _require_keys(cost, ("trained", "frozen", "flops"), str(path))
    return cost


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
