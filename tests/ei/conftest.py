"""A small study on disk: two modalities of 8 x 8 px, three classes, and a run trained on it."""

import csv
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ei.config import Config, DataConfig, ModelConfig, TrainConfig

CLASSES = ("dark", "grey", "light")
SPLITS = {"train": 12, "val": 6, "test": 9}


def write(folder: Path, splits: Mapping[str, int] = SPLITS) -> Path:
    """Images whose brightness is their class, with some noise; returns the manifest."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "patient", "split", "label", "cfp", "oct"])
        for split, count in splits.items():
            for number in range(count):
                label = number % len(CLASSES)
                names = []
                for modality in ("cfp", "oct"):
                    names.append(f"{split}{number}_{modality}.png")
                    pixels = generator.integers(0, 60, (8, 8)) + 90 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / names[-1])
                writer.writerow([f"{split}{number}", f"{split}{number // 2}", split, CLASSES[label], *names])
    return folder / "manifest.csv"


def configuration(manifest: Path, **train: object) -> Config:
    settings = {"optimizer": "adamw", "lr": 3e-3, "epochs": 1, "batch_size": 6, "bootstrap": 50, "device": "cpu"}
    return Config(
        data=DataConfig(manifest=str(manifest), modalities=("cfp", "oct"), image_size=8),
        model=ModelConfig(backbone="tiny"),
        train=replace(TrainConfig(), **{**settings, **train}),
    )


@pytest.fixture(scope="session")
def write_study() -> Callable[..., Path]:
    """(folder, rows of each split) -> the manifest of a study written there."""
    return write


@pytest.fixture(scope="session")
def study_config() -> Callable[..., Config]:
    """(manifest, fields of TrainConfig) -> a configuration that trains within a second."""
    return configuration


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write(tmp_path / "study")


@pytest.fixture(scope="session")
def lasting_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study for runs that several tests look at; it is only read."""
    return write(tmp_path_factory.mktemp("lasting") / "study")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is only read, both stages of one epoch; its manifest lies beside it in study/."""
    from ei import train

    folder = tmp_path_factory.mktemp("finished")
    return train(configuration(write(folder / "study")), folder / "run")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a report are described and not drawn, which takes most of its time."""
    from ei.report import figures

    nothing = "data:image/svg+xml;base64,"
    monkeypatch.setattr(figures, "_as_picture", lambda figure, alt: figures.Picture(nothing, alt))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    config = Config.load(tmp_path / "copy/run/config.yaml")
    moved = replace(config.data, manifest=str(tmp_path / "copy/study/manifest.csv"))
    replace(config, data=moved).save(tmp_path / "copy/run/config.yaml")
    return tmp_path / "copy/run"
