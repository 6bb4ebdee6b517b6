"""Evaluate a run: from its rows to logits, from logits to figures and files.

Shapes: N samples, C classes, M modalities.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ei.config import Config
from ei.data.manifest import Manifest, Row, read_manifest
from ei.evaluation.cost import measure_cost
from ei.evaluation.external import EXTERNAL, read_external
from ei.evaluation.gates import gate_rows, recorded_gates
from ei.evaluation.inference import predict_rows
from ei.evaluation.predictions import errors_file, labels_of, measure, stored_logits, summarised
from ei.evaluation.tables import prediction_table, write_csv, write_json
from ei.evaluation.temperature import fit_temperatures, read_temperatures, temperature_file
from ei.processes import Processes
from ei.report.page import write_report
from ei.runs.folder import RunFolder
from ei.runs.loading import best_checkpoint, changed_data, load
from ei.runs.setup import require_usable, require_val_rows
from mor.files import write_atomically

EVALUATED = ("val", "test")


def evaluate(run: str | Path, manifest: str | Path | None = None, out: str | Path | None = None) -> dict[str, Any]:
    """Evaluate a run's best model on the validation and test rows of its manifest, and write what came out.

    Writes metrics.json, predictions.csv, logits.npz, errors.json, cost.json, gates.json, report.html, and with
    ``train.temperature`` temperature.json into the run.

    Args:
        run: A folder written by :func:`ei.train`.
        manifest: Another table to evaluate on instead, all of its rows as one split, "external".
        out: The folder for what comes out of that; it also gets a config.yaml. Temperatures are the run's.

    Returns:
        The content of metrics.json.

    Raises:
        ValueError: the run or the manifest cannot be used, or there is nothing to evaluate on; or rows of ``manifest``
            are of patients, or have images, that the model was trained or chosen on.
    """
    folder = RunFolder(Path(run))
    results = _results_folder(folder, manifest, out)
    model, config = load(run)
    if manifest is None:
        table, splits = _own_rows(folder, config)
    else:
        table, config = read_external(manifest, folder, config)
        splits = {EXTERNAL: list(table.rows)}
    processes = Processes.join(config.train.device)
    model.to(processes.device)
    with recorded_gates(model) as gates:
        predictions = {
            name: predict_rows(model, rows, config, processes=processes, what=f"evaluate {name}")
            for name, rows in splits.items()
        }
    temperatures = {}
    if config.train.temperature and manifest is None:
        temperatures = fit_temperatures(
            predictions["val"].by_source, labels_of(splits["val"]), multi_label=table.multi_label
        )
    elif config.train.temperature:
        temperatures = read_temperatures(folder)
    metrics: dict[str, Any] = {
        "classes": list(table.classes),
        "modalities": list(table.modalities),
        "multi_label": table.multi_label,
        "temperatures": temperatures,
        "splits": {
            name: measure(predictions[name], rows, table, config, temperatures) for name, rows in splits.items()
        },
    }
    for name, rows in splits.items() if config.data.knows_missing else ():
        logits = predictions[name].logits
        metrics["splits"][name]["subsets"] = measure_subsets(model, logits, rows, table, config, processes, name)
    layers = {part: processes.gathered(record.summary()) for part, record in gates.items()}

    def write() -> None:
        scaled = {name: values.at(temperatures) for name, values in predictions.items()}
        tables = [prediction_table(scaled[name], rows, table) for name, rows in splits.items()]
        if manifest is not None:
            results.path.mkdir(parents=True, exist_ok=True)
            config.save(results.config)
        elif temperatures:
            write_json(folder.temperature, temperature_file(folder, temperatures))
        write_json(results.metrics, metrics)
        write_json(results.gates, {part: lines for part, each in layers.items() if (lines := gate_rows(each))})
        write_json(results.cost, measure_cost(model, config))
        write_json(results.errors, errors_file(scaled, splits, table, config))
        write_atomically(results.logits, stored_logits(predictions, splits, table).as_bytes())
        write_csv(results.predictions, [line for table in tables for line in table])
        write_report(results.path)

    processes.first(write)
    return metrics


def _own_rows(folder: RunFolder, config: Config) -> tuple[Manifest, dict[str, list[Row]]]:
    """The run's manifest, and the rows of its splits that are evaluated."""
    if not Path(config.data.manifest).exists():
        raise ValueError(
            f"the manifest of {folder.path}, '{config.data.manifest}', does not exist; if it has moved, write where it"
            f" is now into {folder.config}, or evaluate on another table with --manifest and --out"
        )
    manifest = read_manifest(config.data.manifest, config.data, classes=config.data.classes)
    if changed := changed_data(best_checkpoint(folder).notes, config, manifest):
        raise ValueError(
            f"{changed} is not what it was when {folder.path} was trained, so test rows may have been trained on;"
            " restore it, or evaluate on other samples with --manifest and --out"
        )
    splits = {name: rows for name in EVALUATED if (rows := manifest.split(name))}
    if not splits:
        raise ValueError(f"{config.data.manifest} has neither val nor test rows, so there is nothing to evaluate on")
    if config.train.temperature:
        require_val_rows(manifest)
    return manifest, splits


def _results_folder(folder: RunFolder, manifest: str | Path | None, out: str | Path | None) -> RunFolder:
    """The run's own, or ``out``, which must be new, empty, or of an earlier evaluation."""
    if (manifest is None) != (out is None):
        raise ValueError(
            "manifest and out must be given together: another table, and a folder for what comes out of it"
        )
    if out is None:
        require_usable(folder.path, "evaluation writes its files there")
        return folder
    results = RunFolder(Path(out))
    is_earlier = results.metrics.is_file() and not results.stage2.path.exists()
    if results.path.exists() and not is_earlier and (not results.path.is_dir() or any(results.path.iterdir())):
        raise ValueError(f"out must be a new or empty folder, or one of an earlier evaluation like this, got {out}")
    require_usable(results.path)
    return results


def measure_subsets(
    model: nn.Module,
    logits: np.ndarray,
    rows: Sequence[Row],
    manifest: Manifest,
    config: Config,
    processes: Processes,
    split: str,
) -> dict[str, dict[str, Any] | None]:
    """Metrics of the fused prediction from subsets of the modalities, by names such as "cfp+oct".

    Each is on the rows that have all of the subset, as if they had nothing else; None if there are no such rows.

    Args:
        logits: (N, C), the fused prediction from all that the rows have.
    """
    found = {}
    for subset in config.data.subsets:
        where, those = _having(rows, subset)
        values = logits[where]
        if those and len(subset) < len(manifest.modalities):
            given, what = [row.only(subset) for row in those], f"evaluate {split} with {' + '.join(subset)}"
            values = predict_rows(model, given, config, processes=processes, what=what).logits
        found["+".join(subset)] = summarised(values, those, manifest, config) if those else None
    return found


def _having(rows: Sequence[Row], modalities: Sequence[str]) -> tuple[list[int], list[Row]]:
    """The rows that have all of these modalities, after their positions."""
    where = [position for position, row in enumerate(rows) if row.has_all(modalities)]
    return where, [rows[position] for position in where]
