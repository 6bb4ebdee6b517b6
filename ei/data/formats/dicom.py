"""DICOM files, ``.dcm``, by pydicom (the extra ``io``).

Frames are slices, in the order of the file. Grey values pass the modality LUT (or rescale), then the VOI LUT
or the first window, then MONOCHROME1 is inverted, once. Without a window the whole range of Bits Stored
counts, if it has no sign. Colour becomes RGB, of Bits Stored bits.

Source: DICOM PS3.3, C.11.1 (modality), C.11.2 (VOI) and C.7.6.3.1.2 (photometric interpretation).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ei.data.formats.source import ImageError, Slice, between, require_size

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_PALETTE = "PALETTE COLOR"


class DicomFile:
    """A file of one or more frames; only those asked for are decoded."""

    def __init__(self, path: Path) -> None:
        from pydicom import dcmread
        from pydicom.errors import InvalidDicomError

        self._path = path
        try:
            self._header = dcmread(path, stop_before_pixels=True)
        except InvalidDicomError:
            raise ImageError("is not a DICOM file: the mark DICM is not at byte 128") from None
        missing = [name for name in ("Rows", "Columns", "PhotometricInterpretation") if name not in self._header]
        if missing:
            raise ImageError(f"is DICOM without a picture: it has no {', '.join(missing)}")
        require_size(int(self._header.Rows), int(self._header.Columns))
        self._photometric = str(self._header.PhotometricInterpretation)
        if self._photometric not in (*_GREY, *_COLOUR, _PALETTE):
            raise ImageError(f"has the photometric interpretation {self._photometric}, which is not read")

    @property
    def count(self) -> int:
        return int(self._header.get("NumberOfFrames") or 1)

    def read(self, index: int) -> Slice:
        stored = self._decoded(index)
        if self._photometric == _PALETTE:
            from pydicom.pixels import apply_color_lut

            colours = apply_color_lut(stored, self._header)[..., :3]
            return Slice(colours, float(np.iinfo(colours.dtype).max))
        if self._photometric in _COLOUR:
            return Slice(stored, self._largest())
        return self._grey(stored, index)

    def verify(self) -> None:
        """DICOM has no checksums."""

    def _decoded(self, index: int) -> NDArray[Any]:
        from pydicom.pixels import pixel_array

        try:
            stored = pixel_array(self._path, index=index)
        except RuntimeError as error:
            syntax = self._header.file_meta.TransferSyntaxUID
            if not syntax.is_compressed:
                raise
            raise ImageError(
                f"is compressed ({syntax.name}), and no decoder that is installed could read it; see pydicom's"
                f" documentation on compressed pixel data, or decompress the file ({str(error).splitlines()[0]})"
            ) from error
        if stored.dtype.kind == "u" and stored.max() > self._largest():
            raise ImageError(f"has the number {stored.max()}, but {self._header.BitsStored} bits are stored")
        return stored

    def _largest(self) -> float:
        return float(2 ** int(self._header.BitsStored) - 1)

    def _grey(self, stored: NDArray[Any], index: int) -> Slice:
        from pydicom.pixels import apply_modality_lut

        values = apply_modality_lut(stored, self._group(index, "PixelValueTransformationSequence"))
        black, white = self._range(stored, index)
        return Slice(
            values,
            white,
            black,
            window=_window(self._header, self._group(index, "FrameVOILUTSequence")),
            inverted=self._photometric == "MONOCHROME1",
        )

    def _range(self, stored: NDArray[Any], index: int) -> tuple[float, float | None]:
        """Black and white without a window, after the modality LUT."""
        transformation = self._group(index, "PixelValueTransformationSequence")
        if transformation.get("ModalityLUTSequence"):
            return 0.0, float(2 ** int(transformation.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
        if stored.dtype.kind == "f":
            return 0.0, 1.0
        slope, intercept = 1.0, 0.0
        if "RescaleSlope" in transformation and "RescaleIntercept" in transformation:
            slope, intercept = float(transformation.RescaleSlope), float(transformation.RescaleIntercept)
        # With a sign, zero lies somewhere within; more than 16 bits are doses and counts.
        if stored.dtype.kind != "u" or int(self._header.BitsStored) > 16 or slope <= 0:
            return 0.0, None
        return intercept, intercept + slope * self._largest()

    def _group(self, index: int, name: str) -> Any:
        """The frame's item of a functional group, or else the one that all frames share, or else the file."""
        frames = self._header.get("PerFrameFunctionalGroupsSequence") or []
        shared = self._header.get("SharedFunctionalGroupsSequence") or []
        for groups in (*frames[index : index + 1], *shared[:1]):
            if groups.get(name):
                return groups[name][0]
        return self._header


def _window(header: Any, group: Any) -> Callable[[NDArray[Any]], NDArray[np.float64]] | None:
    if header.get("VOILUTSequence"):
        return lambda values: _through_lut(values, header)
    if group.get("WindowCenter") is None or group.get("WindowWidth") is None:
        return None
    center, width = _first(group.WindowCenter), _first(group.WindowWidth)
    shape = str(group.get("VOILUTFunction") or "LINEAR")
    if (width < 1 and shape == "LINEAR") or width <= 0:
        raise ImageError(f"has a window of width {width:g}, which its kind, {shape}, does not allow")
    if shape == "SIGMOID":
        return lambda values: 1 / (1 + np.exp(-4 * (values.astype(np.float64) - center) / width))
    if shape == "LINEAR_EXACT":
        return lambda values: between(values, center - width / 2, center + width / 2)
    if shape != "LINEAR":
        raise ImageError(f"has a window of the kind {shape}, which is not read")
    if width == 1:
        return lambda values: (values > center - 0.5).astype(np.float64)
    low = center - 0.5 - (width - 1) / 2
    return lambda values: between(values, low, low + width - 1)


def _through_lut(values: NDArray[Any], header: Any) -> NDArray[np.float64]:
    from pydicom.pixels import apply_voi_lut

    depth = int(header.VOILUTSequence[0].LUTDescriptor[2])
    return apply_voi_lut(values.astype(np.int64), header, prefer_lut=True).astype(np.float64) / (2**depth - 1)


def _first(number: Any) -> float:
    """Of several windows, the first."""
    return float(number[0]) if hasattr(number, "__getitem__") and not isinstance(number, str) else float(number)
