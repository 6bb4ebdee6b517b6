"""NIfTI volumes, ``.nii`` and ``.nii.gz``, by nibabel (the extra ``io``).

The third axis of the file counts slices, because that is how they were acquired. The affine says how they lie:
slices run towards head, front or right; within a slice, rows and columns run towards feet, back or left, as
viewers show them. So an axial slice has the front at its top and the patient's right on its left, however the
file was stored. A file without orientation is taken as nibabel does, as LAS.
"""

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ei.data.formats.source import ImageError, Slice, require_size, white_of

_MAX_UNPACKED = 2**32
"""Bytes that a compressed volume, which cannot be mapped, may have in memory."""
_DEFLATE_AT_BEST = 1032
"""Bytes that one compressed byte can stand for."""
_CHUNK = 2**20


class NiftiFile:
    """A volume as slices; of a file that is not compressed, only these are read."""

    def __init__(self, path: Path) -> None:
        import nibabel

        self._path = path
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise ImageError("is not a NIfTI file")
        self._orientation = nibabel.io_orientation(image.affine)
        if not np.isfinite(self._orientation).all():
            raise ImageError("has an affine that says no orientation")
        proxy: Any = image.dataobj
        self._slope, self._intercept = float(proxy.slope), float(proxy.inter)
        self._stored_white = white_of(proxy.dtype)
        shape = _volume_shape(proxy.shape)
        self._unpacked_size = int(proxy.offset) + math.prod(shape) * proxy.dtype.itemsize
        self._require_room()
        self._values: NDArray[Any] = np.asarray(proxy.get_unscaled()).reshape(shape, order="F")

    @property
    def count(self) -> int:
        return self._values.shape[2]

    def read(self, index: int) -> Slice:
        backwards = self._orientation[2, 1] < 0
        plane = self._values[:, :, self.count - 1 - index if backwards else index]
        for axis in (0, 1):
            if self._orientation[axis, 1] > 0:
                plane = np.flip(plane, axis)
        if self._orientation[0, 0] < self._orientation[1, 0]:
            plane = plane.T
        if (self._slope, self._intercept) == (1, 0):
            return Slice(plane, self._stored_white)
        return Slice(plane * self._slope + self._intercept, 1.0)

    def verify(self) -> None:
        """Read a compressed file to its end, where its checksum is."""
        if _is_compressed(self._path):
            with gzip.open(self._path) as file:
                while file.read(_CHUNK):
                    pass

    def _require_room(self) -> None:
        size = self._path.stat().st_size
        if _is_compressed(self._path):
            if self._unpacked_size > _MAX_UNPACKED:
                raise ImageError(
                    f"unpacks to {self._unpacked_size} bytes, at most {_MAX_UNPACKED} are; save it as .nii, not .nii.gz"
                )
            size *= _DEFLATE_AT_BEST
        if self._unpacked_size > size:
            raise ImageError(f"has at most {size} bytes, but its header promises {self._unpacked_size}")


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _volume_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A plane is a volume of one slice; further axes must have length 1."""
    padded = (*shape, 1, 1, 1)
    if len(shape) < 2 or any(length != 1 for length in shape[3:]):
        raise ImageError(f"has shape {shape}; volumes of three axes are read, save each time or channel by itself")
    require_size(padded[0], padded[1])
    if padded[2] < 1:
        raise ImageError(f"is empty: shape {shape}")
    return padded[0], padded[1], padded[2]
