"""PNG, JPEG and TIFF by Pillow: grey of up to 16 bits, colour of 8 or 16, floats.

Shapes: H height, W width in pixels.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from ei.data.formats import source
from ei.data.formats.source import ImageError, Slice, require_size

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "TIFF")
_OPAQUE_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_ALPHA_MODES = ("LA", "PA", "RGBA")
_GREY_16_MODES = ("I;16", "I;16B", "I;16L")
_DEEP_COLOUR = re.compile(r"(RGB|RGBA|RGBX);16[BLN]")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_DICOM_MARK_AT = 128


class PictureFile:
    """A picture, or the pages of a TIFF."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _open_picture(path) as picture:
            self._count = _page_count(picture)

    @property
    def count(self) -> int:
        return self._count

    def read(self, index: int) -> Slice:
        return _decoded_page(self._path, index)

    def verify(self) -> None:
        with _open_picture(self._path) as picture:
            picture.verify()


@contextmanager
def _open_picture(path: Path, page: int = 0) -> Iterator[Image.Image]:
    # Not by name: files that Pillow opens by name it maps into memory, and then it garbles uncompressed TIFFs
    # that are to be turned by a quarter (EXIF orientation 5 to 8; seen in 13.0).
    with path.open("rb") as file:
        try:
            picture = Image.open(file, formats=_FORMATS)
        except Image.UnidentifiedImageError:
            raise ImageError(_not_a_picture(path)) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ImageError(f"has too many pixels; at most {source.MAX_PIXELS} are read") from None
        require_size(picture.height, picture.width)
        if isinstance(picture, TiffImageFile):
            picture.seek(page)
            require_size(picture.height, picture.width)
        yield picture


def _not_a_picture(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_DICOM_MARK_AT + 4)
    if not content:
        return "is empty"
    hint = ""
    if content[_DICOM_MARK_AT:] == b"DICM":
        hint = "; it is DICOM, name it .dcm"
    elif path.suffix.lower() not in PICTURE_SUFFIXES:
        hint = "; other files are read by names that end in .npy, .nii, .nii.gz or .dcm"
    return f"is not a PNG, JPEG or TIFF that can be read{hint}"


def _page_count(picture: Image.Image) -> int:
    if isinstance(picture, TiffImageFile):
        return picture.n_frames
    if picture.format == "PNG" and getattr(picture, "is_animated", False):
        raise ImageError("is an animation; save the one frame that is meant, or several as pages of a TIFF")
    # A JPEG of several pictures (MPO) is a photo followed by its previews.
    return 1


def _decoded_page(path: Path, page: int) -> Slice:
    with _open_picture(path, page) as picture:
        bits = _bits_per_channel(picture)
        if picture.mode in _GREY_16_MODES and "transparency" not in picture.info:
            # Pillow's conversion of these modes to RGB would cut everything above 255.
            return Slice(_pixels(picture), 2**bits - 1, inverted=_zero_is_white(picture))
        if picture.mode == "F":
            return Slice(_pixels(picture), 1, inverted=_zero_is_white(picture))
        if bits > 8:
            return _deep_colour(path, page)
        return Slice(_on_black(_pixels(picture, _mode_to_read(picture)), 255), 255)


def _mode_to_read(picture: Image.Image) -> str:
    if picture.mode not in (*_OPAQUE_MODES, *_ALPHA_MODES):
        raise ImageError(f"has pixels of Pillow's mode {picture.mode!r}, which is not read; save it as .npy")
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        return "RGBA"
    return "L" if picture.mode in ("1", "L") else "RGB"


def _pixels(picture: Image.Image, mode: str = "") -> NDArray[np.float32]:
    upright = ImageOps.exif_transpose(picture)
    return np.asarray(upright.convert(mode) if mode else upright).astype(np.float32)


def _on_black(pixels: NDArray[np.float32], opaque: float) -> NDArray[np.float32]:
    has_alpha = pixels.ndim == 3 and pixels.shape[2] == 4
    return pixels[..., :3] * (pixels[..., 3:] / np.float32(opaque)) if has_alpha else pixels


def _bits_per_channel(picture: Image.Image) -> int:
    if isinstance(picture, TiffImageFile):
        return max(picture.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return 16 if any("16" in raw_mode for raw_mode in _raw_modes(picture)) else 8


def _zero_is_white(picture: Image.Image) -> bool:
    # Pillow inverts such pictures at 8 bits, but neither at 16 nor in floats.
    return isinstance(picture, TiffImageFile) and picture.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _deep_colour(path: Path, page: int) -> Slice:
    """16-bit colour.

    Pillow keeps the high byte of each number. Told that the bytes are in the other order, it keeps the low.
    """
    high, low = _byte_of_colour(path, page), _byte_of_colour(path, page, low=True)
    return Slice(_on_black(256 * high + low, 65535), 65535)


def _byte_of_colour(path: Path, page: int, low: bool = False) -> NDArray[np.float32]:
    with _open_picture(path, page) as picture:
        known = all(_DEEP_COLOUR.fullmatch(raw_mode) for raw_mode in _raw_modes(picture))
        if not known or "transparency" in picture.info:
            raise ImageError("has more than 8 bits in a layout that is not read; save it as uint16 .npy")
        if low:
            picture.tile = [_with_other_byte_order(tile) for tile in picture.tile]  # type: ignore[attr-defined]
        return _pixels(picture)


def _raw_modes(picture: Image.Image) -> list[str]:
    """How numbers lie in the file, such as 'RGB;16B', for each of its tiles."""
    return [_raw_mode(tile) for tile in picture.tile]  # type: ignore[attr-defined]


def _raw_mode(tile: Any) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _with_other_byte_order(tile: Any) -> Any:
    native_swapped = "B" if sys.byteorder == "little" else "L"
    raw_mode = _raw_mode(tile)
    other = raw_mode[:-1] + {"B": "L", "L": "B", "N": native_swapped}[raw_mode[-1]]
    return tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
