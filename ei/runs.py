"""The folder of a run: what lies where, and the trained model back from it."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from torch import nn

from ei.checkpoint import read_checkpoint, restore
from ei.config import Config
from ei.models import Backbone, build_model, load_backbone
from ei.runtime import fingerprint, seed_everything


@dataclass(frozen=True)
class StageFolder:
    """Where one stage writes: ``metrics.jsonl`` (a line per epoch), and its best and last trained parameters."""

    path: Path

    @property
    def history(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        return self.path / "last.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """Names of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.csv"

    @property
    def gates(self) -> Path:
        return self.path / "gates.json"

    @property
    def stage2(self) -> StageFolder:
        return StageFolder(self.path / "stage2")

    def stage1(self, modality: str) -> StageFolder:
        # A modality is a column name, and may hold what a file name may not.
        return StageFolder(self.path / "stage1" / quote(modality, safe=" "))


def load_trunk(config: Config) -> Backbone:
    """The frozen backbone of a configuration; one with random weights is the same for the same seed."""
    seed_everything(config.train.seed)
    return load_backbone(config.model, config.data.image_size)


def load(run: str | Path) -> tuple[nn.Module, Config]:
    """The trained model of a run, on the CPU and in evaluation mode, and its configuration.

    Args:
        run: A folder written by :func:`ei.train`.

    Raises:
        ValueError: the folder is no finished run, a file is damaged, or the backbone's frozen weights are not
            those that the run was trained with.
    """
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise ValueError(f"{folder.path} is no run: it has no {folder.config.name}")
    if not folder.stage2.best.is_file():
        raise ValueError(f"the run {folder.path} has no trained model yet ({folder.stage2.best} is missing)")
    config = Config.load(folder.config)
    checkpoint = read_checkpoint(folder.stage2.best)
    trunk = load_trunk(config)
    # Full tuning replaces every weight of the backbone, so it does not matter from which it started.
    if config.model.adapter != "full" and fingerprint(trunk) != checkpoint.notes["trunk"]:
        raise ValueError(
            f"the frozen weights of backbone '{config.model.backbone}' are not those that {folder.path} was trained"
            " with; its adapters would be put on the wrong model"
        )
    model = build_model(config, len(config.data.classes), trunk=trunk)
    restore(model, checkpoint.parameters)
    return model.eval(), config
