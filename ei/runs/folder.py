"""What lies where in the folder of a run. Imports no torch: the report needs it, too."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote


@dataclass(frozen=True)
class StageFolder:
    """Where one stage writes: ``metrics.jsonl`` (a line per epoch), its best trained parameters, snapshots to go on
    from, and at the end a file ``finished``."""

    path: Path

    @property
    def history(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> Path:
        return self.path / "finished"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"


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
    def logits(self) -> Path:
        return self.path / "logits.npz"

    @property
    def temperature(self) -> Path:
        return self.path / "temperature.json"

    @property
    def errors(self) -> Path:
        return self.path / "errors.json"

    @property
    def cost(self) -> Path:
        return self.path / "cost.json"

    @property
    def gates(self) -> Path:
        return self.path / "gates.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def stage2(self) -> StageFolder:
        return StageFolder(self.path / "stage2")

    def stage1(self, modality: str, auxiliary: bool = False) -> StageFolder:
        """Of the primary ViT, or of an ``auxiliary`` one with a backbone of its own."""
        # A modality is a column name, and may hold what a file name may not.
        return StageFolder(self.path / ("stage1-auxiliary" if auxiliary else "stage1") / quote(modality, safe=" "))
