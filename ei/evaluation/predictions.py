"""What a model has predicted for rows of a manifest, and what is made of it: metrics, raw logits, worst errors.

Shapes: N samples, C classes, M modalities. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ei.config import Config
from ei.data.manifest import Manifest, Row
from ei.evaluation.worst import worst_errors
from ei.metrics.calibration import calibration
from ei.metrics.classification import summarise
from ei.runs.stored_logits import StoredLogits


@dataclass(frozen=True)
class Predictions:
    """Raw outputs for N samples, float32, in the order in which they were asked for."""

    logits: np.ndarray  # (N, C)
    modality_logits: dict[str, np.ndarray]  # modality -> (N, C), nan where a row has no image of it
    modality_weights: np.ndarray | None  # (N, M)

    @property
    def by_source(self) -> dict[str, np.ndarray]:
        """ "fused" and each modality -> (N, C)."""
        return {"fused": self.logits} | self.modality_logits

    def at(self, temperatures: Mapping[str, float]) -> "Predictions":
        """Logits divided by the temperature of their source, in float64; those of a source without one as they are."""
        scaled = {
            source: logits.astype(float) / temperatures[source] if source in temperatures else logits
            for source, logits in self.by_source.items()
        }
        return replace(self, logits=scaled.pop("fused"), modality_logits=scaled)


def measure(
    predictions: Predictions,
    rows: Sequence[Row],
    manifest: Manifest,
    config: Config,
    temperatures: Mapping[str, float],
) -> dict[str, Any]:
    """Metrics of the fused prediction, and of each modality's own on the rows that have it, if there are any.

    Temperatures change nothing but ``calibration``; beside it, ``uncalibrated`` is what it would be without them.
    """
    summaries = {}
    scaled = predictions.at(temperatures).by_source
    for source, logits in predictions.by_source.items():
        where = np.flatnonzero(np.isfinite(logits).all(axis=1)).tolist()
        if not where:
            continue
        those = [rows[index] for index in where]
        summaries[source] = summarised(logits[where], those, manifest, config)
        summaries[source]["calibration"] = _calibration(scaled[source][where], those, manifest, config)
        if source in temperatures:
            summaries[source]["uncalibrated"] = _calibration(logits[where], those, manifest, config)
    return {"fused": summaries.pop("fused"), "modalities": summaries}


def summarised(logits: np.ndarray, rows: Sequence[Row], manifest: Manifest, config: Config) -> dict[str, Any]:
    """:func:`ei.metrics.classification.summarise` of one set of predictions."""
    return summarise(logits, *_samples(rows, manifest), **_settings(manifest, config))


def _calibration(logits: np.ndarray, rows: Sequence[Row], manifest: Manifest, config: Config) -> dict[str, Any]:
    return calibration(logits, *_samples(rows, manifest), **_settings(manifest, config))


def _samples(rows: Sequence[Row], manifest: Manifest) -> tuple[np.ndarray, list[str], Sequence[str]]:
    return labels_of(rows), [row.patient for row in rows], manifest.classes


def _settings(manifest: Manifest, config: Config) -> dict[str, Any]:
    return {"multi_label": manifest.multi_label, "bootstrap": config.train.bootstrap, "seed": config.train.seed}


def stored_logits(
    predictions: Mapping[str, Predictions], splits: Mapping[str, Sequence[Row]], manifest: Manifest
) -> StoredLogits:
    """All splits one after the other."""
    rows = [row for split in splits.values() for row in split]
    each = [np.stack(list(predictions[name].by_source.values())) for name in splits]
    return StoredLogits(
        classes=np.array(manifest.classes),
        sources=np.array(["fused", *predictions[next(iter(splits))].modality_logits]),
        ids=np.array([row.id for row in rows]),
        patients=np.array([row.patient for row in rows]),
        splits=np.array([row.split for row in rows]),
        labels=labels_of(rows),
        logits=np.concatenate(each, axis=1),
    )


def errors_file(
    predictions: Mapping[str, Predictions], splits: Mapping[str, Sequence[Row]], manifest: Manifest, config: Config
) -> dict[str, Any]:
    """The worst errors of the test split, or of the one that there is, and where their images are."""
    split = "test" if "test" in splits else next(iter(splits))
    samples = worst_errors(
        predictions[split].by_source,
        splits[split],
        manifest.classes,
        multi_label=manifest.multi_label,
        count=config.train.report_images,
        folder=Path(config.data.manifest).parent,
    )
    return {"split": split, "samples": samples}


def labels_of(rows: Sequence[Row]) -> np.ndarray:
    """(N,) class indices, or (N, C) of 0 and 1."""
    return np.array([row.label for row in rows])
