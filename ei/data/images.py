"""Image files as tensors: what is read, on which scale, and what is refused.

Shapes: S slices (1 for a plain image), H height, W width in pixels.

What a file holds is asked of its name: ``.npy``, ``.nii`` and ``.nii.gz``, ``.dcm``; all others must be PNG, JPEG
or TIFF. :mod:`ei.data.formats` has a module for each.

===========================  ==============================================================================
grey                         repeated to three channels
palette, CMYK, YBR           converted to RGB (colour profiles are not applied)
transparency                 composited on black, like the corners that a rotation uncovers: what was hidden is 0
EXIF orientation             applied
animated PNG                 refused; of a JPEG with previews (MPO), the photo is read
TIFF of several pages        a volume with a slice per page; all pages have one size
``.npy`` (H, W)              a grey image
``.npy`` (H, W, 3)           a colour image: a last axis of 3 always means colour
``.npy`` (S, H, W)           a volume of grey slices
NIfTI of three axes          the third counts slices; see :mod:`ei.data.formats.nifti` for how they lie
DICOM of several frames      a volume with a slice per frame
===========================  ==============================================================================

How numbers become 0..1, by :class:`ei.intensity.Intensity`:

=============================  ======================================  ======================================
numbers                        ``type`` (the default)                  ``LOW:HIGH``, ``percentiles``
=============================  ======================================  ======================================
8 bits without sign            divided by 255                          the same, divided by 255
16 bits without sign           divided by 65535; by 4095 where a TIFF  LOW is black, HIGH is white, straight
                               says that it has 12 bits, ...           between, cut off outside; or so with the
float                          as they are; must be within 0..1        0.5th and 99.5th percentile of the file
other integers                 refused: they have no black and white   (all slices and channels together)
NIfTI with scl_slope           rescaled, then as floats                rescaled, then as above
DICOM, grey                    modality LUT, then VOI LUT or the       modality LUT, then as above; then
                               first window, else by Bits Stored if    MONOCHROME1 inverted
                               without sign; then MONOCHROME1
                               inverted
DICOM, colour                  divided by the largest number of        as above
                               Bits Stored
=============================  ======================================  ======================================

Numbers that are not finite are always refused. Nothing is guessed or repaired: whatever else a file holds is an
:class:`ImageError` that names the file. torch is imported by the function that makes tensors, so that checking
files does not need it.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ei.data.formats.array import ArrayFile
from ei.data.formats.dicom import DicomFile
from ei.data.formats.nifti import NiftiFile
from ei.data.formats.picture import PictureFile
from ei.data.formats.source import MAX_PIXELS, ImageError, ImageFile, Slice, require_finite
from ei.intensity import BY_TYPE, Intensity

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_PIXELS", "ImageError", "check_image", "count_slices", "read_image", "read_slices"]

_BLACK_PERCENTILE, _WHITE_PERCENTILE = 0.5, 99.5
_LIMITS_KEPT = 65_536


def read_image(path: str | Path, slices: Sequence[int] | None = None, *, intensity: Intensity = BY_TYPE) -> "Tensor":
    """The pixels of a file, float32 in 0..1.

    Args:
        path: a PNG, JPEG, TIFF, ``.npy``, NIfTI or DICOM file.
        slices: which slices to read, in this order, repeats allowed; None reads all. Of an ``.npy``, ``.nii``
            or DICOM volume only these are read from disk.
        intensity: which numbers are black and white (the table above).

    Returns:
        (S, 3, H, W), float32; S is ``len(slices)``, or all slices of the file.

    Raises:
        ImageError: the file is missing, damaged, too large, or of a kind that is not read.
        ImportError: the extra ``io`` is needed, and is not installed.

    Example:
        A PNG of 640 x 480 pixels gives (1, 3, 480, 640); an array (17, 256, 256) with
        ``slices=(2, 6, 10, 14)`` gives (4, 3, 256, 256).
    """
    import torch

    with _named_errors(path):
        file = _opened(Path(path))
        limits = _limits_kept(Path(path), intensity)
        pixels = [torch.from_numpy(slice_.as_unit(limits)) for slice_ in _read(file, slices)]
        return torch.stack([_channels_first(slice_) for slice_ in pixels])


def count_slices(path: str | Path) -> int:
    """How many slices :func:`read_image` gives: pages, frames, S of a volume, else 1.

    Raises:
        ImageError: as :func:`read_image`, as far as the file's header tells.
    """
    with _named_errors(path):
        return _opened(Path(path)).count


def check_image(path: str | Path, *, intensity: Intensity = BY_TYPE) -> None:
    """Read a file to the end, as :func:`read_image` would, and check its checksums; needs no torch.

    Raises:
        ImageError: as :func:`read_image`, or a checksum is wrong.
    """
    for _ in read_slices(path, intensity=intensity):
        pass


def read_slices(path: str | Path, *, intensity: Intensity = BY_TYPE) -> Iterator[tuple[Slice, NDArray[np.float32]]]:
    """Every slice of a file whose checksums are right, as it is stored and in 0..1.

    Raises:
        ImageError: as :func:`check_image`; ImportError as :func:`read_image`.
    """
    with _named_errors(path):
        file = _opened(Path(path))
        file.verify()
        limits = _limits(file, intensity)
        slices = _read(file, None)
    while True:
        with _named_errors(path):
            slice_ = next(slices, None)
            if slice_ is None:
                return
            unit = slice_.as_unit(limits)
        yield slice_, unit


@contextmanager
def _named_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{path}: reading it needs {error.name}, which comes with an extra: pip install "mixture-of-ranks[io]"'
        ) from error
    except Exception as error:
        # A damaged file makes a decoder raise nearly anything: OSError, SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: cannot be read: {reason}") from error


def _opened(path: Path) -> ImageFile:
    _require_file(path)
    name = path.name.lower()
    kind: Callable[[Path], ImageFile] = PictureFile
    if name.endswith(".npy"):
        kind = ArrayFile
    elif name.endswith((".nii", ".nii.gz")):
        kind = NiftiFile
    elif name.endswith(".dcm"):
        kind = DicomFile
    if kind is not PictureFile and path.stat().st_size == 0:
        raise ImageError("is empty")
    return kind(path)


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


def _read(file: ImageFile, slices: Sequence[int] | None) -> Iterator[Slice]:
    shape = None
    for index in _require_slices(slices, file.count):
        slice_ = file.read(index)
        shape = shape or slice_.values.shape
        if slice_.values.shape != shape:
            raise ImageError(f"has pages of different shapes: {slice_.values.shape} after {shape}")
        yield slice_


def _require_slices(slices: Sequence[int] | None, count: int) -> Sequence[int]:
    if slices is None:
        return range(count)
    for index in slices:
        if not 0 <= index < count:
            raise ImageError(f"slices must be within 0..{count - 1}, got {index}")
    return slices


def _limits_kept(path: Path, intensity: Intensity) -> Intensity:
    if intensity.rule != "percentiles":
        return intensity
    state = path.stat()
    return _limits_of(path, intensity, (state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@lru_cache(maxsize=_LIMITS_KEPT)
def _limits_of(path: Path, intensity: Intensity, state: tuple[int, ...]) -> Intensity:
    """The limits of a file in this state; its percentiles need all of it, so they are computed once."""
    return _limits(_opened(path), intensity)


def _limits(file: ImageFile, intensity: Intensity) -> Intensity:
    if intensity.rule != "percentiles":
        return intensity
    slices = list(_read(file, None))
    if all(slice_.is_8_bit for slice_ in slices):
        return BY_TYPE
    values: NDArray[Any] = np.stack([slice_.values for slice_ in slices])
    require_finite(values)
    low, high = np.percentile(values, (_BLACK_PERCENTILE, _WHITE_PERCENTILE))
    return Intensity("window", float(low), float(high))


def _channels_first(pixels: "Tensor") -> "Tensor":
    """(H, W) or (H, W, 3) to (3, H, W)."""
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
