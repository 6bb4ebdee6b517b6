"""Images on disk as far as they are the same every time, so that later epochs need not decode them again.

What is kept is what a slice of a file has become where chance begins (``Transform.fixed``): in training it is decoded,
scaled to 0..1 and, if large, shrunk to twice the size that is needed; in evaluation it is all that the model reads. The
name of an entry is a hash of all that it depends on: the bytes of the file, the slice, intensity and transform, and
the versions of the libraries and the kind of processor that made it. So nothing ever has to be removed because it is
out of date, files may be renamed and edited, and one folder serves any number of runs and processes.

An entry carries its own SHA-256; a damaged one is said, and made again. Where nothing can be written, training goes on
without, and says so once.

Milliseconds of CPU time for one image, median of 25, one thread of an AMD EPYC: what is fixed made from the file, and
read from here with its hash checked; in brackets the size of an entry. The first time costs up to a third more.

=============================  ======================  ======================  ======================
file                           training, 224 px        training, 448 px        evaluation, 448 px
=============================  ======================  ======================  ======================
JPEG, colour, 2000 x 1500      73, 2.4 (3.2 MB)        67, 9.8 (12.8 MB)       58, 1.8 (2.4 MB)
PNG, colour, 2000 x 1500       85, 2.4 (3.2 MB)        91, 9.6 (12.8 MB)       66, 1.6 (2.4 MB)
PNG, grey of 16 bits, same     65, 0.9 (1.1 MB)        71, 3.7 (4.3 MB)        65, 1.9 (2.4 MB)
PNG, grey, 512 x 512           4.8, 0.7 (0.8 MB)       2.4, 0.9 (1.0 MB)       4.8, 1.9 (2.4 MB)
``.nii.gz``, 60 x 256 x 256    33, 0.2 (0.3 MB)        33, 0.2 (0.3 MB)        35, 1.7 (2.4 MB)
=============================  ======================  ======================  ======================

With augmentation a training sample of one such JPEG takes 86 and 12 ms at 224 px, 107 and 53 ms at 448 px.

Not kept, because it would gain nothing: slices of ``.npy`` and ``.nii`` files, which are mapped into memory, and JPEGs
that nothing has made smaller.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save
from torch import Tensor

from ei.data.audit import Checked
from ei.data.images import read_image
from ei.data.transforms import Transform
from ei.intensity import Intensity
from ei.progress import say
from mor.files import write_atomically

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

FORMAT = "ei-image-1"
_LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "nibabel", "pydicom")
_MAPPED = (".npy", ".nii")
_QUICK = (".jpg", ".jpeg")
_DIGEST_BYTES = 32


class ImageCache:
    """Entries for one transform.

    Args:
        folder: Made if need be; several runs may share it.
        transform: Its fixed part is what is kept.
    """

    def __init__(self, folder: str | Path, transform: Transform) -> None:
        self._folder = Path(folder)
        self._transform = transform
        self._recipe = [FORMAT, transform.recipe(), torch.backends.cpu.get_cpu_capability(), *_versions()]
        self._is_full = _flag(self._folder)

    def fixed(self, path: Path, slices: Sequence[int], intensity: Intensity, checked: Checked) -> list[Tensor]:
        """The fixed part of these slices of a file, (3, H, W) each, read from here or from the file.

        Args:
            path: A file that is what was checked.
            slices: In this order, repeats allowed.
            intensity: As of :func:`ei.data.images.read_image`.
            checked: Of the file.

        Raises:
            ImageError: as :func:`ei.data.images.read_image`.
        """
        if path.name.lower().endswith(_MAPPED):
            return [self._transform.fixed(image) for image in read_image(path, slices, intensity=intensity)]
        entries = {index: self._entry(index, intensity, checked) for index in sorted(set(slices))}
        found = {index: image for index, entry in entries.items() if (image := self._read(entry)) is not None}
        if missing := [index for index in entries if index not in found]:
            for index, image in zip(missing, read_image(path, missing, intensity=intensity), strict=True):
                found[index] = self._transform.fixed(image)
                if not path.name.lower().endswith(_QUICK) or found[index].numel() < image.numel():
                    self._write(entries[index], found[index])
        return [found[index] for index in slices]

    def _entry(self, index: int, intensity: Intensity, checked: Checked) -> Path:
        depends_on = [*self._recipe, checked.sha256, index, *astuple(intensity)]
        name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
        return self._folder / name[:2] / name

    def _read(self, entry: Path) -> Tensor | None:
        try:
            content = entry.read_bytes()
        except OSError:
            return None
        digest, kept = content[:_DIGEST_BYTES], memoryview(content)[_DIGEST_BYTES:]
        if _digest(entry, kept) != digest:
            say(f"{entry} in the image cache is damaged; the image is decoded again")
            return None
        return load(bytes(kept))["image"].expand(3, -1, -1).contiguous()

    def _write(self, entry: Path, image: Tensor) -> None:
        if self._is_full.value:
            return
        # Of grey images one channel is enough.
        is_grey = torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        kept = save({"image": image[:1].contiguous() if is_grey else image})
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # patients' images: for nobody else
            entry.parent.mkdir(exist_ok=True)
            write_atomically(entry, _digest(entry, kept) + kept)
        except OSError as error:
            with self._is_full.get_lock():
                is_known, self._is_full.value = self._is_full.value, True
            if not is_known:
                say(f"note: nothing more is written to the image cache {self._folder}: {error.strerror}")


def _digest(entry: Path, kept: bytes | memoryview) -> bytes:
    """Of the name, too: one entry in the place of another is damaged."""
    return hashlib.sha256(entry.name.encode() + bytes(kept)).digest()


@lru_cache
def _flag(folder: Path) -> "Synchronized[bool]":
    """One for all processes that load, so that something is said once."""
    return multiprocessing.Value("b", False)


@lru_cache
def _versions() -> tuple[str, ...]:
    return tuple(f"{name} {_version(name)}" for name in _LIBRARIES)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
