"""Arrays of numpy, ``.npy``: mapped, never unpickled; the header is checked before anything is allocated.

Shapes: S slices, H height, W width in pixels.
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from ei.data.formats.source import ImageError, Slice, require_size, white_of


class ArrayFile:
    """An ``.npy`` file as slices; nothing of it is in memory until a slice is read."""

    def __init__(self, path: Path) -> None:
        self._array = _open(path)
        self._white = white_of(self._array.dtype)

    @property
    def count(self) -> int:
        return len(self._array)

    def read(self, index: int) -> Slice:
        return Slice(self._array[index], self._white)

    def verify(self) -> None:
        """The header is all that there is to check."""


def _open(path: Path) -> NDArray[Any]:
    """(S, H, W) or (1, H, W, 3)."""
    with path.open("rb") as file:
        readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
        version = npy_format.read_magic(file)
        if version not in readers:
            raise ImageError(f"is .npy of version {version}; versions 1.0 and 2.0 are read")
        shape, fortran_order, dtype = readers[version](file)
        offset = file.tell()
    white_of(dtype)
    # In Python's integers, which do not overflow, and before anything is allocated.
    promised, found = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if promised != found:
        raise ImageError(f"has {found} bytes, but its header {shape} {dtype} promises {promised}")
    is_colour = _is_colour(shape)
    require_size(*(shape[:2] if is_colour else shape[-2:]))
    if 0 in shape:
        raise ImageError(f"is empty: shape {shape}")
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    array = np.memmap(path, dtype, "r", offset, shape, order)
    return array[None] if is_colour or array.ndim == 2 else array


def _is_colour(shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return False
    # (H, W, 1) would pass for H slices of one column each.
    if len(shape) != 3 or shape[2] in (1, 2, 4):
        raise ImageError(f"has shape {shape}; (H, W), (H, W, 3) and (S, H, W) are read")
    return shape[2] == 3
