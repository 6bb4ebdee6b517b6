"""Trained models back from the folder of a run."""

from pathlib import Path

from torch import nn

from ei.checkpoint import Checkpoint, read_checkpoint, restore
from ei.config import Config
from ei.models import Backbone, build_model, load_backbone
from ei.run_folder import RunFolder
from ei.runtime import fingerprint, seed_everything


def load_trunk(config: Config) -> Backbone:
    """The frozen backbone of a configuration; one with random weights is the same for the same seed."""
    seed_everything(config.train.seed)
    return load_backbone(config.model, config.data.image_size)


def load(run: str | Path, modality: str | None = None) -> tuple[nn.Module, Config]:
    """The trained model of a run, on the CPU and in evaluation mode, and its configuration.

    Args:
        run: A folder written by :func:`ei.train`.
        modality: Load the model of the first stage for this modality instead of the final one.

    Raises:
        ValueError: the folder is no finished run, a file is damaged, or the backbone's frozen weights are not
            those that the run was trained with.
    """
    folder, config = open_run(run)
    model = build_model(config, len(config.data.classes), modality=modality, trunk=(trunk := load_trunk(config)))
    stage = folder.stage2 if modality is None else folder.stage1(modality)
    if not stage.best.is_file():
        raise ValueError(f"the run {folder.path} has no trained model yet ({stage.best} is missing)")
    checkpoint = read_checkpoint(stage.best)
    # Full tuning replaces every weight of the backbone, so it does not matter from which it started.
    if config.model.adapter != "full" and fingerprint(trunk) != checkpoint.notes["trunk"]:
        raise ValueError(
            f"the frozen weights of backbone '{config.model.backbone}' are not those that {folder.path} was trained"
            " with; its adapters would be put on the wrong model"
        )
    restore(model, checkpoint.parameters)
    return model.eval(), config


def open_run(run: str | Path) -> tuple[RunFolder, Config]:
    """A run's folder and configuration; a ValueError if it is no run."""
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise ValueError(f"{folder.path} is no run: it has no {folder.config.name}")
    return folder, Config.load(folder.config)


def stage1_checkpoint(run: str | Path, modality: str, config: Config, manifest_hash: str, trunk: str) -> Checkpoint:
    """What another run's first stage has learned about a modality, if it may be used with ``config``.

    Raises:
        ValueError: that run saw other data, which could leak into the test rows, or has another model.
    """
    folder, other = open_run(run)
    checkpoint = read_checkpoint(folder.stage1(modality).best)
    model_fields = ("backbone", "adapter", "targets", "ranks", "alphas", "bypass", "dropout")
    different = [name for name, value in vars(config.data).items() if vars(other.data)[name] != value]
    different += [name for name in model_fields if getattr(other.model, name) != getattr(config.model, name)]
    if checkpoint.notes["manifest"] != manifest_hash:
        different.append("content of the manifest")
    if checkpoint.notes["trunk"] != trunk:
        different.append("weights of the backbone")
    if different:
        raise ValueError(f"stage1_from {folder.path} cannot be used here, its {', '.join(different)} differ")
    return checkpoint
