"""From a trained model to logits, from logits to files: evaluate a run, predict new samples.

Shapes: N samples, C classes, M modalities.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ei.config import Config
from ei.data.loaders import evaluation_loader
from ei.data.manifest import Manifest, Row, read_manifest
from ei.exports import csv_bytes
from ei.metrics import summarise
from ei.models import Encoder
from ei.processes import Processes
from ei.progress import track
from ei.report import write_report
from ei.run_folder import RunFolder
from ei.runs import best_checkpoint, load, manifest_hash
from ei.runtime import arithmetic
from mor import MoRLinear, record_gates
from mor.files import write_atomically
from mor.gates import GateRecord, GateSummary

EVALUATED = ("val", "test")


@dataclass(frozen=True)
class Predictions:
    """Raw outputs for N samples, float32, in the order in which they were asked for."""

    logits: np.ndarray  # (N, C)
    modality_logits: dict[str, np.ndarray]  # modality -> (N, C)
    modality_weights: np.ndarray | None  # (N, M)


def predict_rows(
    model: nn.Module, rows: Sequence[Row], config: Config, *, processes: Processes, what: str = "predict"
) -> Predictions:
    """Run a model over rows, each exactly once, without augmentation; the model's mode is kept.

    Of several processes each takes a part of the rows, and all get all of the results.

    Raises:
        ValueError: the model gives something that is not finite; the message names the samples.
    """
    count = processes.count
    own, ids = _predict(model, rows[processes.index :: count], config, processes, what)
    parts = processes.gathered((own, ids))
    order = np.argsort(np.concatenate([np.arange(len(rows))[index::count] for index in range(count)]))
    found = [name for _, part_ids in parts for name in part_ids]
    if [found[position] for position in order] != [row.id for row in rows]:
        raise RuntimeError("samples came back in another order than they were asked for")
    kinds = next(part for part, part_ids in parts if part_ids)
    together = {kind: np.concatenate([part[kind] for part, part_ids in parts if part_ids])[order] for kind in kinds}
    logits = together.pop(LOGITS)
    if not np.isfinite(logits).all():
        bad = [row.id for row, finite in zip(rows, np.isfinite(logits).all(1), strict=True) if not finite]
        raise ValueError(
            f"the model gives numbers that are not finite for {', '.join(bad[:8])} ({what}); if this is while training,"
            " it has diverged: lower lr"
        )
    weights = together.pop(WEIGHTS, None)
    return Predictions(logits, {modality: values for (_, modality), values in together.items()}, weights)


LOGITS, WEIGHTS = ("logits", ""), ("weights", "")


@torch.no_grad()
def _predict(
    model: nn.Module, rows: Sequence[Row], config: Config, processes: Processes, what: str
) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """What one process finds, by kind, and the ids of its rows."""
    loader = evaluation_loader(rows, config, count=processes.count)
    was_training = model.training
    model.eval()
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    ids: list[str] = []
    for batch in track(loader, what, len(loader)):
        with arithmetic(processes.device, config.train.precision):
            output = model(batch.to(processes.device))
        kinds = {LOGITS: output.logits, WEIGHTS: output.modality_weights}
        kinds |= {("modality", name): logits for name, logits in output.modality_logits.items()}
        for kind, values in kinds.items():
            if values is not None:
                found.setdefault(kind, []).append(values.float().cpu().numpy())
        ids += batch.ids
    model.train(was_training)
    return {kind: np.concatenate(values) for kind, values in found.items()}, ids


def evaluate(run: str | Path) -> dict[str, Any]:
    """Evaluate a run's best model on the validation and test rows of its manifest, and write what came out.

    Writes metrics.json, predictions.csv, gates.json (if there are routers) and report.html into the run.

    Args:
        run: A folder written by :func:`ei.train`.

    Returns:
        The content of metrics.json.

    Raises:
        ValueError: the run or its manifest cannot be used, or there is nothing to evaluate on.
    """
    folder = RunFolder(Path(run))
    model, config = load(run)
    manifest = read_manifest(config.data.manifest, config.data, classes=config.data.classes)
    if manifest_hash(config) != best_checkpoint(folder).notes["manifest"]:
        raise ValueError(
            f"{config.data.manifest} is not what it was when {folder.path} was trained, so test rows may have been"
            " trained on; restore it, or use ei predict on a manifest of new samples"
        )
    splits = {name: rows for name in EVALUATED if (rows := manifest.split(name))}
    if not splits:
        raise ValueError(f"{config.data.manifest} has neither val nor test rows, so there is nothing to evaluate on")
    processes = Processes.join(config.train.device)
    model.to(processes.device)
    with recorded_gates(model) as gates:
        predictions = {
            name: predict_rows(model, rows, config, processes=processes, what=f"evaluate {name}")
            for name, rows in splits.items()
        }
    metrics: dict[str, Any] = {
        "classes": list(manifest.classes),
        "modalities": list(manifest.modalities),
        "multi_label": manifest.multi_label,
        "splits": {name: measure(predictions[name], rows, manifest, config) for name, rows in splits.items()},
    }
    for name, rows in splits.items() if config.data.knows_missing else ():
        logits = predictions[name].logits
        metrics["splits"][name]["subsets"] = measure_subsets(model, logits, rows, manifest, config, processes, name)
    layers = {part: processes.gathered(record.summary()) for part, record in gates.items()}
    if processes.is_first:
        write_json(folder.metrics, metrics)
        write_json(folder.gates, {part: lines for part, each in layers.items() if (lines := _gate_rows(each))})
        tables = [prediction_table(predictions[name], rows, manifest) for name, rows in splits.items()]
        write_csv(folder.predictions, [line for table in tables for line in table])
        write_report(folder.path)
    return metrics


def predict(run: str | Path, manifest: str | Path, out: str | Path) -> None:
    """Predict every row of a manifest, which needs no labels, and write a CSV with probabilities.

    Args:
        run: A folder written by :func:`ei.train`.
        manifest: CSV with ``id`` and the columns of the run's modalities, whose cells may be empty if the run was
            trained with ``allow_missing`` or ``modality_dropout``.
        out: The CSV to write; columns are id, patient, split, label (both empty), ``fused:CLASS``,
            ``MODALITY:CLASS`` (empty for a modality that the row lacks) and ``weight:MODALITY``.

    Raises:
        ValueError: the run or the manifest cannot be used.
    """
    if Path(out).is_dir() or Path(out).resolve() == Path(manifest).resolve():
        raise ValueError(f"out must be a file of its own, got {out}")
    model, config = load(run)
    data = replace(config.data, allow_missing=config.data.knows_missing)
    table = read_manifest(manifest, data, classes=data.classes, labelled=False)
    processes = Processes.join(config.train.device)
    predictions = predict_rows(model.to(processes.device), table.rows, config, processes=processes)
    write_csv(Path(out), prediction_table(predictions, table.rows, table))


def measure(predictions: Predictions, rows: Sequence[Row], manifest: Manifest, config: Config) -> dict[str, Any]:
    """Metrics of the fused prediction, and of each modality's own on the rows that have it, if there are any."""
    modalities = {}
    for modality, logits in predictions.modality_logits.items():
        where, those = _having(rows, [modality])
        if those:
            modalities[modality] = _measured(logits[where], those, manifest, config)
    return {"fused": _measured(predictions.logits, rows, manifest, config), "modalities": modalities}


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
    measured = {}
    for subset in config.data.subsets:
        where, those = _having(rows, subset)
        values = logits[where]
        if those and len(subset) < len(manifest.modalities):
            given, what = [row.only(subset) for row in those], f"evaluate {split} with {' + '.join(subset)}"
            values = predict_rows(model, given, config, processes=processes, what=what).logits
        measured["+".join(subset)] = _measured(values, those, manifest, config) if those else None
    return measured


def _having(rows: Sequence[Row], modalities: Sequence[str]) -> tuple[list[int], list[Row]]:
    """The rows that have all of these modalities, after their positions."""
    where = [position for position, row in enumerate(rows) if row.has(modalities)]
    return where, [rows[position] for position in where]


def _measured(logits: np.ndarray, rows: Sequence[Row], manifest: Manifest, config: Config) -> dict[str, Any]:
    return summarise(
        logits,
        np.array([row.label for row in rows]),
        [row.patient for row in rows],
        manifest.classes,
        multi_label=manifest.multi_label,
        bootstrap=config.train.bootstrap,
        seed=config.train.seed,
    )


def prediction_table(predictions: Predictions, rows: Sequence[Row], manifest: Manifest) -> list[dict[str, Any]]:
    """One dict per row, column name -> cell: probabilities, fused and per modality, and the modality weights.

    The cells of a modality that the row lacks are empty, and its weight is 0.
    """
    logits = {"fused": predictions.logits} | predictions.modality_logits
    probs = {source: probabilities(values, manifest.multi_label) for source, values in logits.items()}
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


def probabilities(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """(N, C) -> (N, C): softmax over the classes, or a sigmoid each, computed in float64."""
    values = torch.from_numpy(logits).double()
    return (values.sigmoid() if multi_label else values.softmax(1)).numpy()


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
        lines.append(" " * width + "".join(f"  {name:<20}" for name in names))
        for source, figures in {"fused": fused, **measured["modalities"]}.items():
            cells = "".join(f"  {_interval(figures['overall'][name]):<20}" for name in names)
            lines.append(f"{source:<{width}}{cells}".rstrip())
        if fused["absent"]:
            lines.append(f"left out of the means, for want of rows with and without: {', '.join(fused['absent'])}")
    return [*lines, f"report: {folder.report}"]


def _interval(figure: Mapping[str, float | None]) -> str:
    if figure["value"] is None:
        return "undefined"
    text = f"{figure['value']:.3f}"
    return text if figure["low"] is None else f"{text} [{figure['low']:.3f}, {figure['high']:.3f}]"


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write dicts with the same keys as a table; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, csv_bytes(list(lines[0]), [line.values() for line in lines]))
