"""Small pictures of image files for a page: what the model saw, and nothing that a browser cannot show. No torch."""

import base64
import io
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ei.data.images import count_slices, read_slices
from ei.intensity import BY_TYPE, Intensity

SIDE = 160
"""Longer side of a thumbnail, in pixels."""
_QUALITY = 85


def thumbnail(path: Path, intensity: Intensity = BY_TYPE) -> str:
    """The middle slice of a file as a data URI, a JPEG with its longer side of :data:`SIDE` pixels.

    Args:
        path: a file that :func:`ei.data.images.read_image` reads.
        intensity: which numbers are black and white.

    Raises:
        ImageError: the file cannot be read.
        ImportError: the extra ``io`` is needed, and is not installed.
    """
    middle = (count_slices(path) - 1) // 2
    _, unit = next(islice(read_slices(path, intensity=intensity), middle, None))
    picture = _resized(Image.fromarray(np.round(255 * unit).astype(np.uint8)))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _resized(picture: Image.Image) -> Image.Image:
    scale = SIDE / max(picture.size)
    # Enlarged pixels stay squares: a blur would show what is not there.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize((max(1, round(scale * picture.width)), max(1, round(scale * picture.height))), method)
