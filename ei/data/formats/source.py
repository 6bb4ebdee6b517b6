"""What every kind of file offers: a count of slices, and each slice as numbers with their black and white.

Shapes: H height, W width in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ei.intensity import BY_TYPE, Intensity

MAX_PIXELS = 89_478_485
"""Largest H x W that is read. Where Pillow starts to warn of decompression bombs, this package refuses."""


class ImageError(ValueError):
    """A file that cannot be used as an image; the message names the file and the reason."""


@dataclass(frozen=True)
class Slice:
    """One picture, as the file holds it."""

    values: NDArray[Any]  # (H, W) or (H, W, 3)
    white: float | None
    """The number that is white; None where neither the type nor the file says."""
    black: float = 0.0
    """The number that is black."""
    window: Callable[[NDArray[Any]], NDArray[np.float64]] | None = None
    """The file's own way from its values to 0..1, which goes before black and white."""
    inverted: bool = False
    """The smallest number is white: inverted once, after everything else."""

    @property
    def is_8_bit(self) -> bool:
        return self.black == 0 and self.white == 255 and self.window is None

    def as_unit(self, intensity: Intensity = BY_TYPE) -> NDArray[np.float32]:
        """The pixels in 0..1. Percentiles must have become a window before.

        Raises:
            ImageError: the numbers do not fit, or nothing says what is black and white.
        """
        if intensity.rule == "window" and not self.is_8_bit:
            require_finite(self.values)
            unit = between(self.values, intensity.low, intensity.high)
        elif self.window is not None:
            require_finite(self.values)
            unit = self.window(self.values)
        else:
            unit = self._by_type()
        return (1 - unit if self.inverted else unit).astype(np.float32)

    def _by_type(self) -> NDArray[Any]:
        if self.white is None:
            raise ImageError(
                f"holds {self.values.dtype}, and neither this type nor a window in the file says which number is black"
                " and which is white; set --intensity to LOW:HIGH or to percentiles"
            )
        if self.white == 1:
            require_unit_range(self.values)
            return self.values
        if self.black:
            return (self.values.astype(np.float64) - self.black) / (self.white - self.black)
        return self.values.astype(np.float32) / np.float32(self.white)


class ImageFile(Protocol):
    """An opened file. What is wrong with its header is raised when it is opened."""

    @property
    def count(self) -> int:
        """Number of slices."""

    def read(self, index: int) -> Slice:
        """One slice, from 0."""

    def verify(self) -> None:
        """Check what reading the slices does not look at, such as checksums."""


def between(values: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    """0 up to ``low``, 1 from ``high``, straight between; a constant picture, low = high, is 0."""
    span = high - low
    return np.clip((values.astype(np.float64) - low) / (span if span > 0 else 1.0), 0, 1)


def white_of(dtype: np.dtype[Any]) -> float | None:
    """What is white by the number type alone: the largest of 8 and 16 bits without sign, 1 of floats.

    Raises:
        ImageError: no numbers that could be pixels.
    """
    if dtype.hasobject:
        raise ImageError("holds Python objects, which are never loaded")
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise ImageError(f"holds {dtype}; integers and floats of at most 64 bits are read")
    if dtype.kind == "f":
        return 1.0
    return float(np.iinfo(dtype).max) if dtype.kind == "u" and dtype.itemsize <= 2 else None


def require_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"is empty: {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise ImageError(f"has {height} x {width} pixels; at most {MAX_PIXELS} are read")


def require_unit_range(values: NDArray[Any]) -> None:
    low, high = values.min(), values.max()
    # Comparisons with NaN are false.
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"has float values from {low} to {high}; they must be finite and within 0..1, unless --intensity is"
            " LOW:HIGH or percentiles"
        )


def require_finite(values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise ImageError("has values that are not finite (NaN or infinity)")
