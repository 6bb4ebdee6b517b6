"""From a trained model and rows of a manifest to logits.

Shapes: N samples, C classes, M modalities.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import nn

from ei.config import Config
from ei.data.loaders import evaluation_loader
from ei.data.manifest import Row
from ei.evaluation.predictions import Predictions
from ei.processes import Processes
from ei.progress import track
from ei.runtime import arithmetic


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
