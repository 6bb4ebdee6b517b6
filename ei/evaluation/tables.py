"""What an evaluation says as tables: probabilities for each row, figures for a terminal; and how tables are written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ei.data.manifest import Manifest, Row
from ei.evaluation.predictions import Predictions
from ei.exports import csv_bytes
from ei.metrics.calibration import probabilities
from ei.runs.folder import RunFolder
from mor.files import write_atomically


def prediction_table(predictions: Predictions, rows: Sequence[Row], manifest: Manifest) -> list[dict[str, Any]]:
    """One dict per row, column name -> cell: probabilities, fused and per modality, and the modality weights.

    The cells of a modality that the row lacks are empty, and its weight is 0.
    """
    probs = {source: probabilities(logits, manifest.multi_label) for source, logits in predictions.by_source.items()}
    table = []
    for index, row in enumerate(rows):
        line: dict[str, Any] = {"id": row.id, "patient": row.patient, "split": row.split}
        line["label"] = label_text(row.label, manifest.classes)
        for source, values in probs.items():
            known = source == "fused" or row.images[source]
            cells = [f"{p:.6f}" if known else "" for p in values[index]]
            line |= {f"{source}:{name}": cell for name, cell in zip(manifest.classes, cells, strict=True)}
        if predictions.modality_weights is not None:
            weights = zip(manifest.modalities, predictions.modality_weights[index], strict=True)
            line |= {f"weight:{modality}": f"{weight:.6f}" for modality, weight in weights}
        table.append(line)
    return table


def label_text(label: int | tuple[int, ...] | None, classes: Sequence[str]) -> str:
    """A class name; several joined by ';'; empty where nothing is known.

    >>> label_text(1, ["dry", "wet"]), label_text((1, 0, 1), ["a", "b", "c"])
    ('wet', 'a;c')
    """
    if label is None:
        return ""
    if isinstance(label, tuple):
        return ";".join(name for name, present in zip(classes, label, strict=True) if present)
    return classes[label]


def metrics_table(run: str | Path) -> list[str]:
    """The overall figures of a run as lines of text, with their 95 % intervals; says so if there are none."""
    folder = RunFolder(Path(run))
    if not folder.metrics.is_file():
        return [
            f"{folder.path} has not been evaluated, because its manifest has neither val nor test rows;"
            f" 'ei evaluate {folder.path} --manifest OTHER --out FOLDER' does it on other samples"
        ]
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    names = ["mAP", "mAUC", "mS2", "accuracy"]
    width = max(len("fused"), *map(len, metrics["modalities"]))
    lines = []
    for split, measured in metrics["splits"].items():
        fused = measured["fused"]
        few = fused["overall"]["mAP"]["low"] is None
        intervals = "no intervals (fewer than 5 patients, or --bootstrap 0)" if few else "95 % intervals by patient"
        lines.append(f"{split}: {fused['samples']} samples, patients: {fused['patients']}, {intervals}")
        lines.append(" " * width + "".join(f"  {name:<20}" for name in names) + "  ECE")
        for source, figures in {"fused": fused, **measured["modalities"]}.items():
            cells = "".join(f"  {_interval(figures['overall'][name]):<20}" for name in names)
            lines.append(f"{source:<{width}}{cells}  {_calibration_error(figures)}".rstrip())
        if fused["absent"]:
            lines.append(f"left out of the means, for want of rows with and without: {', '.join(fused['absent'])}")
    if temperatures := metrics.get("temperatures"):
        fitted = ", ".join(f"{source} {value:.3f}" for source, value in temperatures.items())
        lines.append(f"temperatures, fitted on val: {fitted}")
    return [*lines, f"report: {folder.report}"]


def _interval(figure: Mapping[str, float | None]) -> str:
    if figure["value"] is None:
        return "undefined"
    text = f"{figure['value']:.3f}"
    return text if figure["low"] is None else f"{text} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _calibration_error(summary: Mapping[str, Any]) -> str:
    """Empty in metrics that were written before there was one."""
    return f"{summary['calibration']['ECE']['value']:.3f}" if "calibration" in summary else ""


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write dicts with the same keys as a table; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, csv_bytes(list(lines[0]), [line.values() for line in lines]))
