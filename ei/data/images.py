"""Image files as tensors: what is read, on which scale, and what is refused.

Shapes: S slices (1 for a plain image), H height, W width in pixels.

PNG, JPEG and TIFF are read by Pillow, ``.npy`` files by numpy:

=======================  ==================================================================================
8 bits, 16 bits          divided by 255, 65535; all levels of 16 bits are kept, in colour too
float                    as it is; every value must be finite and within 0..1
grey                     repeated to three channels
palette, CMYK            converted to RGB (colour profiles are not applied)
transparency             composited on black, like the corners that a rotation uncovers: what was hidden is 0
EXIF orientation         applied
TIFF of several pages    a volume with a slice per page; all pages have one size
``.npy`` (H, W)          a grey image
``.npy`` (H, W, 3)       a colour image: a last axis of 3 always means colour
``.npy`` (S, H, W)       a volume of grey slices
=======================  ==================================================================================

Nothing is guessed or repaired: whatever else a file holds is an :class:`ImageError` that names the file.
torch is imported by the function that makes tensors, so that checking files does not need it.
"""

import math
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 89_478_485
"""Largest H x W that is read. Where Pillow starts to warn of decompression bombs, this package refuses."""

_FORMATS = ("PNG", "JPEG", "TIFF")
_OPAQUE_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_ALPHA_MODES = ("LA", "PA", "RGBA")
_GREY_16_MODES = ("I;16", "I;16B", "I;16L")
_DEEP_COLOUR = re.compile(r"(RGB|RGBA|RGBX);16[BLN]")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class ImageError(ValueError):
    """A file that cannot be used as an image; the message names the file and the reason."""


def read_image(path: str | Path, slices: Sequence[int] | None = None) -> "Tensor":
    """The pixels of a file, float32 in 0..1.

    Args:
        path: a PNG, JPEG, TIFF or ``.npy`` file.
        slices: which slices to read, in this order, repeats allowed; None reads all. Of an ``.npy``
            volume only these are read from disk.

    Returns:
        (S, 3, H, W), float32; S is ``len(slices)``, or all slices of the file.

    Raises:
        ImageError: the file is missing, damaged, too large, or of a kind that is not read.

    Example:
        A PNG of 640 x 480 pixels gives (1, 3, 480, 640); an array (17, 256, 256) with
        ``slices=(2, 6, 10, 14)`` gives (4, 3, 256, 256).
    """
    import torch

    with _named_errors(path):
        pixels = [torch.from_numpy(slice_) for slice_ in _decoded(Path(path), slices)]
        return torch.stack([_channels_first(slice_) for slice_ in pixels])


def count_slices(path: str | Path) -> int:
    """How many slices :func:`read_image` gives: pages of a TIFF, S of an (S, H, W) array, else 1.

    Raises:
        ImageError: as :func:`read_image`, as far as the file's header tells.
    """
    with _named_errors(path):
        _require_file(Path(path))
        if _is_array(Path(path)):
            return len(_open_array(Path(path)))
        with _open_picture(Path(path)) as picture:
            return _page_count(picture)


def check_image(path: str | Path) -> None:
    """Read a file to the end, as :func:`read_image` would, and check its checksums; needs no torch.

    Integer arrays are judged by their header, because every value of theirs is valid.

    Raises:
        ImageError: as :func:`read_image`, or a checksum is wrong.
    """
    with _named_errors(path):
        _require_file(Path(path))
        if _is_array(Path(path)):
            array = _open_array(Path(path))
            if array.dtype.kind == "f":
                _require_unit_range(array)
            return
        with _open_picture(Path(path)) as picture:
            picture.verify()
        for _ in _decoded(Path(path), None):
            pass


@contextmanager
def _named_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except Exception as error:
        # A damaged file makes a decoder raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error


def _require_file(path: Path) -> None:
    # Opening a FIFO would wait forever, so the kind of file is asked for first.
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.lexists(path):
            raise ImageError("is a link to a file that does not exist") from None
        hint = " (write '/' between folders)" if "\\" in path.name else ""
        raise ImageError(f"does not exist{hint}") from None
    if not stat.S_ISREG(mode):
        raise ImageError("is a directory" if stat.S_ISDIR(mode) else "is not a regular file")


def _is_array(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


def _decoded(path: Path, slices: Sequence[int] | None) -> Iterator[NDArray[np.float32]]:
    """Slices as (H, W) or (H, W, 3), one at a time."""
    _require_file(path)
    if _is_array(path):
        array = _open_array(path)
        for index in _require_slices(slices, len(array)):
            yield _scaled(array[index])
        return
    with _open_picture(path) as picture:
        pages = _require_slices(slices, _page_count(picture))
    shape = None
    for page in pages:
        pixels = _decoded_page(path, page)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise ImageError(f"has pages of different shapes: {pixels.shape} after {shape}")
        yield pixels


def _require_slices(slices: Sequence[int] | None, count: int) -> Sequence[int]:
    if slices is None:
        return range(count)
    for index in slices:
        if not 0 <= index < count:
            raise ImageError(f"slices must be within 0..{count - 1}, got {index}")
    return slices


def _require_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"is empty: {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise ImageError(f"has {height} x {width} pixels; at most {MAX_PIXELS} are read")


def _require_unit_range(values: NDArray[Any]) -> None:
    low, high = values.min(), values.max()
    # Comparisons with NaN are false.
    if not (low >= 0 and high <= 1):
        raise ImageError(f"has float values from {low} to {high}; they must be finite and within 0..1")


def _channels_first(pixels: "Tensor") -> "Tensor":
    """(H, W) or (H, W, 3) to (3, H, W)."""
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)


def _open_array(path: Path) -> NDArray[Any]:
    """An ``.npy`` file as (S, H, W) or (1, H, W, 3), mapped: nothing of it is in memory yet."""
    with path.open("rb") as file:
        readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
        version = npy_format.read_magic(file)
        if version not in readers:
            raise ImageError(f"is .npy of version {version}; versions 1.0 and 2.0 are read")
        shape, fortran_order, dtype = readers[version](file)
        offset = file.tell()
    _require_kind(dtype)
    # In Python's integers, which do not overflow, and before anything is allocated.
    promised, found = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if promised != found:
        raise ImageError(f"has {found} bytes, but its header {shape} {dtype} promises {promised}")
    is_colour = _is_colour(shape)
    _require_size(*(shape[:2] if is_colour else shape[-2:]))
    if 0 in shape:
        raise ImageError(f"is empty: shape {shape}")
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    array = np.memmap(path, dtype, "r", offset, shape, order)
    return array[None] if is_colour or array.ndim == 2 else array


def _require_kind(dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise ImageError("holds Python objects, which are never loaded")
    if not (dtype.kind == "f" or (dtype.kind == "u" and dtype.itemsize <= 2)):
        raise ImageError(f"holds {dtype}; uint8, uint16 and floats within 0..1 are read")


def _is_colour(shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return False
    # (H, W, 1) would pass for H slices of one column each.
    if len(shape) != 3 or shape[2] in (1, 2, 4):
        raise ImageError(f"has shape {shape}; (H, W), (H, W, 3) and (S, H, W) are read")
    return shape[2] == 3


def _scaled(pixels: NDArray[Any]) -> NDArray[np.float32]:
    if pixels.dtype.kind == "f":
        _require_unit_range(pixels)
        return pixels.astype(np.float32)
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


@contextmanager
def _open_picture(path: Path, page: int = 0) -> Iterator[Image.Image]:
    # Not by name: files that Pillow opens by name it maps into memory, and then it garbles uncompressed TIFFs
    # that are to be turned by a quarter (EXIF orientation 5 to 8; seen in 13.0).
    with path.open("rb") as file:
        try:
            picture = Image.open(file, formats=_FORMATS)
        except Image.UnidentifiedImageError:
            empty = path.stat().st_size == 0
            raise ImageError("is empty" if empty else "is not a PNG, JPEG or TIFF that can be read") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ImageError(f"has too many pixels; at most {MAX_PIXELS} are read") from None
        _require_size(picture.height, picture.width)
        if isinstance(picture, TiffImageFile):
            picture.seek(page)
            _require_size(picture.height, picture.width)
        yield picture


def _page_count(picture: Image.Image) -> int:
    if isinstance(picture, TiffImageFile):
        return picture.n_frames
    if picture.format == "PNG" and getattr(picture, "is_animated", False):
        raise ImageError("is an animation; save the one frame that is meant, or several as pages of a TIFF")
    # A JPEG of several pictures (MPO) is a photo followed by its previews.
    return 1


def _decoded_page(path: Path, page: int) -> NDArray[np.float32]:
    """(H, W) or (H, W, 3), in 0..1."""
    with _open_picture(path, page) as picture:
        bits = _bits_per_channel(picture)
        if picture.mode in _GREY_16_MODES and "transparency" not in picture.info:
            # Pillow's conversion of these modes to RGB would cut everything above 255.
            return _white_is_one(picture, _pixels(picture) / np.float32(2**bits - 1))
        if picture.mode == "F":
            grey = _pixels(picture)
            _require_unit_range(grey)
            return _white_is_one(picture, grey)
        if bits > 8:
            return _deep_colour(path, page)
        return _on_black(_pixels(picture, _mode_to_read(picture)) / np.float32(255))


def _mode_to_read(picture: Image.Image) -> str:
    if picture.mode not in (*_OPAQUE_MODES, *_ALPHA_MODES):
        raise ImageError(f"has pixels of Pillow's mode {picture.mode!r}, which is not read; save it as .npy")
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        return "RGBA"
    return "L" if picture.mode in ("1", "L") else "RGB"


def _pixels(picture: Image.Image, mode: str = "") -> NDArray[np.float32]:
    upright = ImageOps.exif_transpose(picture)
    return np.asarray(upright.convert(mode) if mode else upright).astype(np.float32)


def _on_black(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    has_alpha = pixels.ndim == 3 and pixels.shape[2] == 4
    return pixels[..., :3] * pixels[..., 3:] if has_alpha else pixels


def _bits_per_channel(picture: Image.Image) -> int:
    if isinstance(picture, TiffImageFile):
        return max(picture.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return 16 if any("16" in raw_mode for raw_mode in _raw_modes(picture)) else 8


def _white_is_one(picture: Image.Image, grey: NDArray[np.float32]) -> NDArray[np.float32]:
    # Pillow inverts pictures whose zero is white at 8 bits, but neither at 16 nor in floats.
    inverted = isinstance(picture, TiffImageFile) and picture.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    return 1 - grey if inverted else grey


def _deep_colour(path: Path, page: int) -> NDArray[np.float32]:
    """16-bit colour in 0..1.

    Pillow keeps the high byte of each number. Told that the bytes are in the other order, it keeps the low.
    """
    high, low = _byte_of_colour(path, page), _byte_of_colour(path, page, low=True)
    return _on_black((256 * high + low) / np.float32(65535))


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
