"""Before training: what a configuration resolves to, and whether a run may begin in a folder, or go on in it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ei.config import TWO_STAGES, Config
from ei.data.listed import counted
from ei.data.manifest import SPLITS, Manifest
from ei.progress import say
from ei.runs.folder import RunFolder

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What may differ when a run goes on: it changes how fast results come, and not what they are.
MAY_CHANGE = {"data": {"cache"}, "train": {"device", "workers", "save_minutes", "micro_batch", "tensorboard"}}


def resolved(config: Config, manifest: Manifest) -> Config:
    """The configuration as it is saved: classes in their order, files by absolute paths, only stages that there are."""
    prior = config.train.gate_prior
    if prior and prior not in manifest.modalities:
        raise ValueError(f"gate_prior must be one of {', '.join(manifest.modalities)}, got '{prior}'")
    weights = config.data.class_weights
    if weights and len(weights) != len(manifest.classes):
        raise ValueError(
            f"class_weights must have one number for each of {', '.join(manifest.classes)}, got {len(weights)}"
        )
    if config.train.temperature:
        require_val_rows(manifest)
    require_positions(config, manifest)
    if config.data.cache and Path(config.data.cache).exists() and not Path(config.data.cache).is_dir():
        raise ValueError(f"cache must be a folder, got {config.data.cache}")
    data = replace(
        config.data,
        classes=manifest.classes,
        manifest=_absolute(config.data.manifest),
        cache=_absolute(config.data.cache),
    )
    model = replace(
        config.model, weights=_absolute(config.model.weights), aux_weights=_absolute(config.model.aux_weights)
    )
    train = replace(config.train, stage1_from=_absolute(config.train.stage1_from))
    if config.model.fusion not in TWO_STAGES and train.stages != "2":
        say(f"note: fusion '{config.model.fusion}' has no first stage, so stages is '2'")
        train = replace(train, stages="2")
    return replace(config, data=data, model=model, train=train)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def require_positions(config: Config, manifest: Manifest) -> None:
    """Raise a ValueError if a row has more images of a modality than the fusion has learned positions for."""
    if config.model.fusion != "raddiag":
        return
    places = ((row, modality) for row in manifest.rows for modality in manifest.modalities)
    counts = ((row.count_images(modality, config.data), row, modality) for row, modality in places)
    most, row, modality = max(counts, key=lambda each: each[0])
    if most > config.baseline.raddiag_slices:
        raise ValueError(
            f"raddiag_slices must be at least the number of images of a modality, {most} ({modality} of row"
            f" {row.number}, id '{row.id}'), got {config.baseline.raddiag_slices}"
        )


def require_negatives(config: Config, processes: int = 1) -> None:
    """Raise a ValueError if a contrastive loss would have nothing to tell a sample from."""
    has_loss = config.model.fusion == "joint" and config.baseline.joint_weight > 0
    if has_loss and config.train.samples_at_once(processes) == 1:
        raise ValueError(
            "with fusion 'joint', two or more samples must go through the model at once, because its contrastive loss"
            " tells each from the others; raise batch_size or micro_batch, or set joint_weight to 0"
        )


def require_val_rows(manifest: Manifest) -> None:
    """Raise a ValueError if there is nothing to fit temperatures on."""
    if not manifest.split("val"):
        raise ValueError(
            "temperature is fitted on val rows, and the manifest has none; add val rows, or leave temperature out"
        )


def tell_warnings(manifest: Manifest, path: str | Path) -> None:
    """How many there are, and the first."""
    if manifest.warnings:
        say(f"note: {counted(len(manifest.warnings), 'warning')} about {path}; 'ei check' shows all")
        say(f"  {manifest.warnings[0]}")


def require_measurable(manifest: Manifest, *, alone: bool = True) -> None:
    """Every class can be learned; and the mAP that chooses the gate prior and the best epoch exists.

    Args:
        alone: Each modality is trained alone first, so the same must be true of the rows that have it.
    """
    _require_measurable(manifest, "", "is a label misspelt, or a split wrong?")
    for modality in manifest.missing() if alone else ():
        having = manifest.having(modality)
        _require_measurable(having, f" with {modality}", "add such rows, or train with --stages 2")


def tell_rows(manifest: Manifest) -> None:
    """How many each split has of each class, and how many of them lack a modality."""
    counts = [_positives(manifest, split).sum(0) for split in SPLITS]
    numbers = zip(manifest.classes, *counts, strict=True)
    say(f"classes, {'/'.join(SPLITS)} rows: " + ", ".join(f"{name} {a}/{b}/{c}" for name, a, b, c in numbers))
    for modality, lacking in manifest.missing().items():
        say(f"rows without {modality}, {'/'.join(SPLITS)}: " + "/".join(str(lacking.get(split, 0)) for split in SPLITS))


def _require_measurable(manifest: Manifest, which: str, way_out: str) -> None:
    counts = {split: _positives(manifest, split).sum(0) for split in ("train", "val")}  # of each class (C,)
    unseen = [name for name, count in zip(manifest.classes, counts["train"], strict=True) if not count]
    if unseen:
        raise ValueError(f"no train row{which} is of class {', '.join(unseen)}; {way_out}")
    for split, of_class in counts.items():
        rows = len(manifest.split(split))
        if rows and not any(0 < count < rows for count in of_class):
            raise ValueError(
                f"the {split} rows{which} are all alike, so no average precision can be computed on them; add {split}"
                " rows of other classes, or leave val out altogether to train for exactly --epochs epochs"
            )


def resumes(folder: RunFolder, config: Config) -> bool:
    """Whether the folder holds a run of this configuration, to go on with; False if it is new or empty.

    Raises:
        ValueError: it holds something else, or a run with other settings, which are listed.
    """
    require_usable(folder.path)
    if not folder.config.is_file():
        # Names with a dot are what a run leaves that was killed before it began.
        if folder.path.exists() and any(not path.name.startswith(".") for path in folder.path.iterdir()):
            raise ValueError(f"{folder.path} is neither a run nor an empty folder; choose another with --out")
        return False
    if different := differences(Config.load(folder.config, of_run=True).to_dict(), config.to_dict()):
        raise ValueError(
            f"the run in {folder.path} was begun with other settings: {'; '.join(different)}. Choose another folder"
            " with --out, or go on with the settings it has"
        )
    return True


def differences(was: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings in which two configurations differ, and how; but for those that may change."""
    return [
        f"{section} {name} (was {was[section][name]}, is {value})"
        for section, values in now.items()
        for name, value in values.items()
        if value != was[section][name] and name not in MAY_CHANGE.get(section, ())
    ]


def require_usable(folder: Path, way_out: str = "choose another with --out") -> None:
    """Raise a ValueError unless it is a folder that can be written to, or can be made one."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} exists and is not a folder; {way_out}")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} cannot be written to; {way_out}")


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Make the folder and keep other processes from training in it; the lock ends with the process, however it ends.

    Raises:
        ValueError: another process is training there.
        OSError: the folder cannot be made or written.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is training in {folder.path}; choose another with --out") from error
        yield


def _positives(manifest: Manifest, split: str) -> np.ndarray:
    """(N, C) bool: which rows of a split are of which class."""
    labels = [row.label for row in manifest.split(split)]
    if manifest.multi_label:
        return np.array(labels, dtype=bool).reshape(len(labels), len(manifest.classes))
    return np.array(labels, dtype=int)[:, None] == np.arange(len(manifest.classes))
