"""What goes wrong while images are loaded is one sentence, whichever process loads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ei.config import Config, DataConfig, TrainConfig
from ei.data.images import ImageError
from ei.data.loaders import TrainingSteps, evaluation_loader
from ei.data.manifest import Row, read_manifest

CONFIG = Config(data=DataConfig(modalities=("oct",), image_size=8, classes=("x", "y")), train=TrainConfig(batch_size=2))


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Of five images, of which one has changed since."""
    lines = ["id,split,label,oct"]
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(f"r{number},train,{'xy'[number % 2]},{number}.png")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    found = read_manifest(tmp_path / "m.csv", CONFIG.data).rows
    (tmp_path / "3.png").write_bytes((tmp_path / "2.png").read_bytes())
    return list(found)


@pytest.mark.fault("an image that changes, read by {workers} other processes", "one sentence with file and row")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_an_error_is_one_sentence_in_every_process(rows: list[Row], workers: int, train: bool) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, workers=workers))
    batches = TrainingSteps(rows, config).of_epoch(0) if train else iter(evaluation_loader(rows, config))
    with pytest.raises(ImageError) as error:
        list(batches)
    assert str(error.value).count("\n") == 0
    assert str(error.value).endswith("(row 5, id 'r3')")


def test_the_batches_before_an_error_come_first(rows: list[Row]) -> None:
    batches = iter(evaluation_loader(rows, CONFIG))
    assert next(batches).ids == ["r0", "r1"]
    with pytest.raises(ImageError, match="row 5"):
        next(batches)
