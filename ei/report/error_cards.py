"""The worst errors as a page shows them: their images, and what each source says of the classes that matter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ei.config import DataConfig, TrainConfig
from ei.data.images import ImageError
from ei.intensity import Intensity
from ei.report.figures import Picture
from ei.report.thumbnails import thumbnail
from ei.runs.files import RunFiles

FILES_SHOWN = 3
"""Of a sample's files in one modality."""


def error_cards(files: RunFiles) -> list[dict[str, Any]]:
    """One per sample, as many as ``report_images`` says."""
    wanted = files.config.get("train", {}).get("report_images", TrainConfig.report_images)
    data = files.config.get("data", {})
    rules = DataConfig(modalities=tuple(data.get("modalities", ())), intensity=tuple(data.get("intensity", ("type",))))
    folder = Path(data.get("manifest", "")).parent

    def images(sample: Mapping[str, Any], modality: str) -> dict[str, Any]:
        names, alt = sample["files"].get(modality, ()), f"{modality} of sample {sample['id']}"
        shown = [_shown(folder / name, alt, rules.intensity_of(modality)) for name in names[:FILES_SHOWN]]
        return {"shown": shown, "more": len(names) - len(shown)}

    return [
        {
            "id": sample["id"],
            "patient": sample["patient"],
            "loss": sample["loss"],
            "sources": list(sample["probabilities"]),
            "classes": _classes_that_matter(sample, files.metrics),
            "images": {modality: images(sample, modality) for modality in files.metrics["modalities"]},
        }
        for sample in files.errors.get("samples", ())[:wanted]
    ]


def _classes_that_matter(sample: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that are true, or that some source takes for true; of each, the probability by every source."""
    probs = {source: values for source, values in sample["probabilities"].items() if values}
    highest = {source: max(range(len(values)), key=values.__getitem__) for source, values in probs.items()}
    if metrics["multi_label"]:
        taken = {index for values in probs.values() for index, p in enumerate(values) if p > 0.5}
    else:
        taken = set(highest.values())
    chosen = taken | set(sample["labels"]) or {highest["fused"]}
    return [
        {
            "name": metrics["classes"][index],
            "is_true": index in sample["labels"],
            "probabilities": [values[index] if values else None for values in sample["probabilities"].values()],
        }
        for index in sorted(chosen)
    ]


def _shown(path: Path, alt: str, intensity: Intensity) -> Picture | str:
    """A thumbnail, or why there is none."""
    try:
        return Picture(thumbnail(path, intensity), alt)
    except (ImageError, ImportError) as error:
        return str(error)
