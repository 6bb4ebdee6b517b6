"""Thumbnails show what a file holds, whatever its type, and refuse what cannot be read."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ei.data.images import ImageError
from ei.intensity import Intensity
from ei.report.thumbnails import SIDE, thumbnail


def decoded(uri: str) -> Image.Image:
    kind, _, content = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def written(path: Path, pixels: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(("shape", "size"), [((40, 20), (80, 160)), ((300, 900), (160, 53)), ((3, 2000), (160, 1))])
def test_the_longer_side_is_fixed_and_the_shape_kept(tmp_path: Path, shape: tuple, size: tuple) -> None:
    assert SIDE == 160
    path = written(tmp_path / "image.png", np.zeros(shape, np.uint8))
    assert decoded(thumbnail(path)).size == size


def test_colours_and_enlarged_pixels_stay(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    shown = np.asarray(decoded(thumbnail(written(tmp_path / "image.png", colours))).convert("RGB")).astype(int)
    for (row, column), corner in np.ndenumerate(np.arange(4).reshape(2, 2)):
        block = shown[80 * row + 16 : 80 * row + 64, 80 * column + 16 : 80 * column + 64]
        assert abs(block - colours[row, column].astype(int)).max() <= 8, corner


def test_sixteen_bits_are_seen_under_the_intensity_of_training(tmp_path: Path) -> None:
    """12 bits in 16: nearly black by type, the whole range under 0:4095."""
    path = written(tmp_path / "image.npy", np.array([[0, 4095]], np.uint16).repeat(8, 0).repeat(4, 1))
    assert np.asarray(decoded(thumbnail(path))).max() < 30
    shown = np.asarray(decoded(thumbnail(path, Intensity.parse("0:4095"))))
    assert shown.min() < 10 and shown.max() > 245
    assert np.asarray(decoded(thumbnail(path, Intensity.parse("percentiles")))).max() > 245


@pytest.mark.parametrize(("count", "middle"), [(1, 0), (2, 0), (5, 2), (6, 2)])
def test_of_a_volume_the_middle_slice_is_shown(tmp_path: Path, count: int, middle: int) -> None:
    volume = np.full((count, 8, 8), 0, np.uint8)
    volume[middle] = 200
    shown = np.asarray(decoded(thumbnail(written(tmp_path / "volume.npy", volume))))
    assert abs(int(shown.mean()) - 200) <= 2


@pytest.mark.parametrize("content", [None, b"", b"no image", b"\x89PNG\r\n\x1a\n and no more"])
def test_what_cannot_be_read_is_an_image_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=r"image\.png"):
        thumbnail(path)


def test_no_torch_is_imported() -> None:
    code = "import sys, ei.report.thumbnails, ei.report.against, ei.evaluation.worst; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
