"""From a trained model to logits, from logits to figures and files: evaluate a run.

Shapes: N samples, C classes, M modalities.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ei.config import Config
from ei.data.loaders import evaluation_loader
from ei.data.manifest import Manifest, Row, read_manifest
from ei.evaluation.cost import measure_cost
from ei.evaluation.external import EXTERNAL, read_external
from ei.evaluation.predictions import Predictions, errors_file, labels_of, measure, stored_logits, summarised
from ei.evaluation.temperature import fit_temperatures, read_temperatures, temperature_file
from ei.exports import csv_bytes
from ei.metrics.calibration import probabilities
from ei.models import Encoder
from ei.processes import Processes
from ei.progress import track
from ei.report.page import write_report
from ei.runs.folder import RunFolder
from ei.runs.loading import best_checkpoint, changed_data, load
from ei.runs.setup import require_val_rows
from ei.runtime import arithmetic
from mor import MoRLinear, record_gates
from mor.files import write_atomically
from mor.gates import GateRecord, GateSummary

EVALUATED = ("val", "test")


def predict_rows(
    model: nn.Module, rows: Sequence[Row], config: Config, *, processes: Processes, what: str = "predict"
) -> Predictions:
    """Run a model over rows, each exactly once, without augmentation; the model's mode is kept.

    Of several processes each takes a part of the rows, and all get all of the results.

    Raises:
        ValueError: the model gives something that is not finite; the message names the samples.
    """
    count = processes.count
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    own: list[str] = []
    for outputs, ids in _outputs(model, rows[processes.index :: count], config, processes.device, count, what):
        for kind, values in outputs.items():
            found.setdefault(kind, []).append(values)
        own += ids
    parts = processes.gathered(({kind: np.concatenate(values) for kind, values in found.items()}, own))
    order = np.argsort(np.concatenate([np.arange(len(rows))[index::count] for index in range(count)]))
    names = [name for _, part_ids in parts for name in part_ids]
    kinds = next(part for part, part_ids in parts if part_ids)
    together = {kind: np.concatenate([part[kind] for part, part_ids in parts if part_ids])[order] for kind in kinds}
    return _checked(together, [names[position] for position in order], rows, what)


def predict_batches(
    model: nn.Module, rows: Sequence[Row], config: Config, *, device: torch.device, what: str = "predict"
) -> Iterator[Predictions]:
    """The same in this process alone, batch by batch.

    Raises:
        ValueError: as :func:`predict_rows`.
    """
    expected = iter(rows)
    for outputs, ids in _outputs(model, rows, config, device, 1, what):
        yield _checked(outputs, ids, list(islice(expected, len(ids))), what)


LOGITS, WEIGHTS = ("logits", ""), ("weights", "")


def _checked(
    outputs: dict[tuple[str, str], np.ndarray], ids: Sequence[str], rows: Sequence[Row], what: str
) -> Predictions:
    """Outputs by kind as those of these rows."""
    if list(ids) != [row.id for row in rows]:
        raise RuntimeError("samples came back in another order than they were asked for")
    logits, weights = outputs.pop(LOGITS), outputs.pop(WEIGHTS, None)
    if not np.isfinite(logits).all():
        bad = [row.id for row, finite in zip(rows, np.isfinite(logits).all(1), strict=True) if not finite]
        raise ValueError(
            f"the model gives numbers that are not finite for {', '.join(bad[:8])} ({what}); if this is while training,"
            " it has diverged: lower lr"
        )
    each = {modality: values for (_, modality), values in outputs.items()}
    for modality, values in each.items():
        values[[not row.images[modality] for row in rows]] = np.nan
    return Predictions(logits, each, weights)


@torch.no_grad()
def _outputs(
    model: nn.Module, rows: Sequence[Row], config: Config, device: torch.device, count: int, what: str
) -> Iterator[tuple[dict[tuple[str, str], np.ndarray], list[str]]]:
    """What one of ``count`` processes finds, by kind, batch by batch, and the ids."""
    loader = evaluation_loader(rows, config, count=count)
    was_training = model.training
    model.eval()
    try:
        for batch in track(loader, what, len(loader)):
            with arithmetic(device, config.train.precision):
                output = model(batch.to(device))
            kinds = {LOGITS: output.logits, WEIGHTS: output.modality_weights}
            kinds |= {("modality", name): logits for name, logits in output.modality_logits.items()}
            yield (
                {kind: values.float().cpu().numpy() for kind, values in kinds.items() if values is not None},
                batch.ids,
            )
    finally:
        model.train(was_training)


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
        write_json(results.gates, {part: lines for part, each in layers.items() if (lines := _gate_rows(each))})
        write_json(results.cost, measure_cost(model, config))
        write_json(results.errors, errors_file(scaled, splits, table, config))
        write_atomically(results.logits, stored_logits(predictions, splits, table).as_bytes())
        write_csv(results.predictions, [line for table in tables for line in table])
        write_report(results.path)

    processes.first(write)
    return metrics


def _own_rows(folder: RunFolder, config: Config) -> tuple[Manifest, dict[str, list[Row]]]:
    """The run's manifest, and the rows of its splits that are evaluated."""
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
        return folder
    results = RunFolder(Path(out))
    is_earlier = results.metrics.is_file() and not results.stage2.path.exists()
    if results.path.exists() and not is_earlier and (not results.path.is_dir() or any(results.path.iterdir())):
        raise ValueError(f"out must be a new or empty folder, or one of an earlier evaluation like this, got {out}")
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


@contextmanager
def recorded_gates(model: nn.Module) -> Iterator[Mapping[str, GateRecord]]:
    """Records of all routers by the ViT they belong to, such as "primary/oct"; empty if there are none.

    Of a ViT in both roles there is one record, "primary+auxiliary/oct".
    """
    roles: dict[tuple[nn.Module, str], list[str]] = {}
    for name, branch in model.named_modules():
        if isinstance(branch, Encoder) and _has_router(branch):
            roles.setdefault((branch.backbone.vit, branch.modality), []).append(name.split(".")[0] or "unimodal")
    with ExitStack() as stack:
        yield {
            f"{'+'.join(each)}/{modality}": stack.enter_context(record_gates(vit))
            for (vit, modality), each in roles.items()
        }


def _has_router(module: nn.Module) -> bool:
    return any(isinstance(layer, MoRLinear) and layer.mor_router is not None for layer in module.modules())


def _gate_rows(each: Sequence[Mapping[str, GateSummary]]) -> list[dict[str, Any]]:
    """A dict per layer, from what each process saw of it."""
    layers = dict.fromkeys(layer for summaries in each for layer in summaries)
    return [{"layer": layer} | asdict(_joined([s[layer] for s in each if layer in s])) for layer in layers]


def _joined(parts: Sequence[GateSummary]) -> GateSummary:
    """The summary of all tokens together; all of its figures are means over tokens."""
    tokens = [part.tokens for part in parts]

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=tokens)) if len(parts) > 1 else values[0]

    return GateSummary(
        gates=tuple(mean(values) for values in zip(*(part.gates for part in parts), strict=True)),
        bypass=None if parts[0].bypass is None else mean([part.bypass or 0.0 for part in parts]),
        entropy=mean([part.entropy for part in parts]),
        effective_rank=mean([part.effective_rank for part in parts]),
        tokens=sum(tokens),
    )


def metrics_table(run: str | Path) -> list[str]:
    """The overall figures of a run as lines of text, with their 95 % intervals; says so if there are none."""
    folder = RunFolder(Path(run))
    if not folder.metrics.is_file():
        return [f"{folder.path} has not been evaluated"]
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
