"""Trained models back from the folder of a run."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ei.config import ADAPTERS, Config
from ei.data.manifest import Manifest
from ei.models import Backbone, build_model, load_backbone
from ei.runs.checkpoint import Checkpoint, read_checkpoint, restore
from ei.runs.folder import RunFolder, require_run
from ei.runs.setup import MAY_CHANGE
from ei.runtime import fingerprint, same_weights


def load_trunk(config: Config) -> Backbone:
    """The frozen backbone of a configuration; one with random weights is the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return load_backbone(config.model, config.data.image_size)


def load(run: str | Path, modality: str | None = None) -> tuple[nn.Module, Config]:
    """The best model of a run so far, on the CPU and in evaluation mode, and the run's configuration.

    Args:
        run: A folder written by :func:`ei.train`.
        modality: Load the model of the first stage for this modality instead of the final one.

    Raises:
        ValueError: the folder is no run or has no such model yet, a file is damaged, or the backbone's frozen
            weights are not those that the run was trained with.
    """
    folder, config = open_run(run)
    trunk = load_trunk(config)
    aux_trunk = load_trunk(config.auxiliary) if config.auxiliary and modality is None else None
    model = build_model(config, len(config.data.classes), modality=modality, trunk=trunk, aux_trunk=aux_trunk)
    checkpoint = best_checkpoint(folder, modality)
    frozen = joined(fingerprint(trunk), fingerprint(aux_trunk) if aux_trunk else {})
    # Full tuning replaces every weight of the backbone, so it does not matter from which it started.
    if config.model.adapter != "full" and not same_weights(frozen, checkpoint.notes["trunk"]):
        raise ValueError(
            f"the frozen weights of {names_of_backbones(config)} are not those that {folder.path} was trained"
            " with; its adapters would be put on the wrong model"
        )
    restore(model, checkpoint.parameters)
    return model.eval(), config


def joined(primary: Mapping[str, list[float]], auxiliary: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The fingerprint of the frozen weights of both; of the auxiliary ones there is none if they are the same."""
    return {**primary, **{f"auxiliary.{name}": value for name, value in auxiliary.items()}}


def names_of_backbones(config: Config) -> str:
    """For messages."""
    auxiliary = f" or of the auxiliary '{config.model.aux_backbone}'" if config.model.aux_backbone else ""
    return f"backbone '{config.model.backbone}'{auxiliary}"


def best_checkpoint(folder: RunFolder, modality: str | None = None, *, auxiliary: bool = False) -> Checkpoint:
    """What a stage has learned, up to its best epoch; a ValueError if there is nothing yet, or it is damaged."""
    stage = folder.stage2 if modality is None else folder.stage1(modality, auxiliary)
    if not stage.best.is_file():
        raise ValueError(f"the run {folder.path} has no trained model yet ({stage.best} is missing)")
    return read_checkpoint(stage.best)


def manifest_hash(config: Config) -> str:
    """SHA-256 of a configuration's manifest, the table itself."""
    return hashlib.sha256(Path(config.data.manifest).read_bytes()).hexdigest()


def data_hashes(config: Config, manifest: Manifest) -> dict[str, str]:
    """By which a run's data are known again: SHA-256 of the table and of all images together."""
    return {"manifest": manifest_hash(config), "images": manifest.images_hash}


def changed_data(notes: Mapping[str, Any], config: Config, manifest: Manifest) -> str:
    """Which of a checkpoint's data are not what they were when it was made, in words; empty if all are."""
    for part, now in data_hashes(config, manifest).items():
        if notes.get(part) != now:
            return config.data.manifest if part == "manifest" else f"an image of {config.data.manifest}"
    return ""


def open_run(run: str | Path) -> tuple[RunFolder, Config]:
    """A run's folder and configuration; a ValueError if it is no run."""
    folder = require_run(Path(run))
    config = Config.load(folder.config, of_run=True)
    if not config.data.classes:
        raise ValueError(f"cannot use the configuration {folder.config}: it names no classes, as that of a run does")
    return folder, config


def stage1_checkpoint(
    run: str | Path,
    modality: str,
    config: Config,
    manifest: Manifest,
    trunk: dict[str, list[float]] | None,
    *,
    auxiliary: bool = False,
) -> Checkpoint:
    """What another run's first stage has learned about a modality, if it may be used with ``config``.

    With ``auxiliary``, that of its auxiliary ViT, whose backbone is that of ``config``. Without the fingerprint of the
    ``trunk``, frozen weights are not compared.

    Raises:
        ValueError: that run saw another table or other images, which could leak into the test rows, has another
            model, or was interrupted.
    """
    folder, other = open_run(run)
    if auxiliary:
        assert other.auxiliary is not None
        other = other.auxiliary
    if not folder.stage1(modality, auxiliary).finished.is_file():
        raise ValueError(f"stage1_from {folder.path} cannot be used here, its stage 1 of '{modality}' is not finished")
    checkpoint = best_checkpoint(folder, modality, auxiliary=auxiliary)
    model_fields = (
        "backbone",
        "adapter",
        "bypass",
        *dict.fromkeys(name for used in ADAPTERS.values() for name in used),
    )
    # Of the same table, one modality's rows are the same however missing ones are treated.
    different = [
        name
        for name, value in vars(config.data).items()
        if vars(other.data)[name] != value and name not in {"allow_missing", "modality_dropout", *MAY_CHANGE["data"]}
    ]
    different += [name for name in model_fields if getattr(other.model, name) != getattr(config.model, name)]
    if part := changed_data(checkpoint.notes, config, manifest):
        different.append(f"content of {part}")
    if trunk is not None and not same_weights(checkpoint.notes["trunk"], trunk):
        different.append("weights of the backbone")
    if different:
        raise ValueError(f"stage1_from {folder.path} cannot be used here, its {', '.join(different)} differ")
    return checkpoint


def stage1_taken_over(
    config: Config,
    manifest: Manifest,
    trunk: dict[str, list[float]] | None = None,
    aux_trunk: dict[str, list[float]] | None = None,
) -> dict[tuple[str, bool], Checkpoint]:
    """Stage 1 of the run that a configuration names, if it does, by modality and whether it is an auxiliary ViT's.

    Auxiliary ViTs that the other run has not got, or with another backbone, are left out.

    Raises:
        ValueError: as :func:`stage1_checkpoint`.
    """
    source = config.train.stage1_from
    if not source:
        return {}
    roles = {False: (config, trunk)}
    if config.auxiliary and open_run(source)[1].model.aux_backbone == config.model.aux_backbone:
        roles[True] = (config.auxiliary, aux_trunk)
    return {
        (modality, auxiliary): stage1_checkpoint(source, modality, theirs, manifest, frozen, auxiliary=auxiliary)
        for auxiliary, (theirs, frozen) in roles.items()
        for modality in manifest.modalities
    }
