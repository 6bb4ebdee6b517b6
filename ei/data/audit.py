"""What the check of a manifest learns about each image file, and how it is remembered. No torch.

A file is read again unless its path, size and times (of content and of inode, in nanoseconds) are what they
were, so that training and evaluation need not decode a data set that nobody has touched. What is remembered
lies in the user's cache folder, is only about files without a fault, and carries its own checksum.

Whoever reads a file after the check asks :func:`require_unchanged` first.
"""

import base64
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from ei.data.formats.source import between
from ei.data.images import ImageError, count_slices, read_slices
from ei.intensity import Intensity

ALIKE = 0.98
"""Likeness from which two images are probably one. Measured on slices of registered brains: at most 0.964 between
two patients, at least 0.988 between a slice and its copy as JPEG of quality 60, or at 0.7 of the size."""

_GRID = 16
"""Fingerprints are pictures of so many pixels in each direction."""
_SMALLEST_SIDE = 32
"""Pixels; smaller images are too coarse to tell apart and get no fingerprint."""
_LEAST_CONTRAST = 0.02
"""Of the fingerprint; without it all images look alike."""
_SEEN = 128
"""Rows and columns of pixels of which an impression is taken."""
_LARGEST_16_BIT = 65535
_CHUNK = 2**20
_VERSION = f"2, Pillow {PIL.__version__}"
_SETTLED_NS = 2_000_000_000
_HASHES_KEPT = 65_536

State = tuple[int, ...]
"""Size, and times of content and of inode in nanoseconds; empty of what is no regular file."""


class Checked(NamedTuple):
    """What a file was when its manifest was checked."""

    sha256: str
    state: State
    slices: int


@dataclass(frozen=True)
class Facts:
    """What is known about a file without a fault."""

    sha256: str
    """Of its bytes."""
    fingerprint: str = ""
    """A small picture of the middle slice; empty for images too small or too flat to tell."""
    brightest: int = 0
    """The largest number of a file of 16 bits that nothing but the type scales; 0 of all others."""
    slices: int = 1
    state: State = ()
    """When it was read."""
    appearance: tuple[float, ...] = ()
    """Height, width and slices; and of the middle slice, in 0..1, how colourful, bright and rich in contrast it is."""


def audit_image(path: Path, intensity: Intensity) -> Facts:
    """Read a file to the end.

    Raises:
        ImageError: it cannot be used.
    """
    state, slices = file_state(path), count_slices(path)
    brightest, fingerprint = 0, ""
    appearance: tuple[float, ...] = ()
    for index, (slice_, unit) in enumerate(read_slices(path, intensity=intensity)):
        by_16_bits = (slice_.black, slice_.white, slice_.window) == (0, _LARGEST_16_BIT, None)
        if by_16_bits and intensity.rule == "type":
            brightest = max(brightest, int(slice_.values.max()))
        if index == slices // 2:
            fingerprint, appearance = _fingerprint(unit), (*unit.shape[:2], slices, *_impression(unit))
    facts = Facts(_sha256(path), fingerprint, brightest, slices, state, appearance)
    if file_state(path)[:2] != state[:2]:
        raise ImageError(f"{path}: was changed while it was read")
    return facts


def require_unchanged(path: Path, checked: Checked) -> None:
    """Make sure that a file is still what was checked; only if its size or times are others is it read for that.

    Raises:
        ImageError: it has another content.
    """
    state = file_state(path)
    if state and state != checked.state and _hash_in_state(path, state) != checked.sha256:
        raise ImageError(
            f"{path}: has changed since the manifest was checked; bring back what it was, or begin anew with what it is"
        )


def file_state(path: Path) -> State:
    """What tells without reading a file whether it is the one that it was."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns) if stat.S_ISREG(found.st_mode) else ()


def likeness(one: Sequence[str], other: Sequence[str]) -> NDArray[np.float32]:
    """How alike images are by their fingerprints: the correlation of their edges, (N, M), at most 1."""
    return _edges(one) @ _edges(other).T


class AuditCache:
    """What is remembered of the files of one folder.

    Args:
        folder: of the manifest; names the file of the cache.
        home: the cache's folder; without it $XDG_CACHE_HOME or ~/.cache. None of it is needed: where it cannot
            be written, every file is read every time.
    """

    def __init__(self, folder: Path, home: Path | None = None) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:20]
        self._file = (home or _cache_home()) / "mixture-of-ranks" / f"audit-{name}.json"
        self._entries = self._load()
        self._changed = False
        self._lock = threading.Lock()

    def facts(self, path: Path, intensity: Intensity, audit: Callable[[Path, Intensity], Facts]) -> Facts:
        """Remembered facts if the file is what it was, else those that ``audit`` finds."""
        key = f"{os.path.realpath(path)}|{intensity.rule} {intensity.low} {intensity.high}"
        known = self._entries.get(key)
        if known and known.state == file_state(path):
            return known
        facts = audit(path, intensity)
        # A file written just now may be written again without its times changing.
        if facts.state and time.time_ns() - facts.state[1] > _SETTLED_NS:
            with self._lock:
                self._entries[key] = facts
                self._changed = True
        return facts

    def save(self) -> None:
        """Write what is new. There is the old file or the new one; it need not survive a crash."""
        if not self._changed:
            return
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        content = json.dumps({key: asdict(facts) for key, facts in self._entries.items()})
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Names of files may be names of patients, so nobody else may read them.
            with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(f"{_checksum(content)}\n{content}")
            os.replace(temporary, self._file)
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def _load(self) -> dict[str, Facts]:
        try:
            checksum, _, content = self._file.read_text().partition("\n")
        except (OSError, ValueError):
            return {}
        entries: dict[str, dict[str, Any]] = json.loads(content) if checksum == _checksum(content) else {}
        tuples = ("state", "appearance")
        return {
            key: Facts(**{**facts, **{name: tuple(facts[name]) for name in tuples}}) for key, facts in entries.items()
        }


def _cache_home() -> Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(os.devnull)


def _checksum(content: str) -> str:
    # With version and fields in it, what an older reader found is not trusted.
    known = ", ".join(field.name for field in fields(Facts))
    return hashlib.sha256(f"{_VERSION}, {known}\n{content}".encode()).hexdigest()


@lru_cache(maxsize=_HASHES_KEPT)
def _hash_in_state(path: Path, state: State) -> str:
    """Of a file that only looks changed, once."""
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fingerprint(pixels: NDArray[np.float32]) -> str:
    """(H, W) or (H, W, 3) in 0..1."""
    grey = pixels.mean(axis=2) if pixels.ndim == 3 else pixels
    if min(grey.shape) < _SMALLEST_SIDE:
        return ""
    picture = Image.fromarray(np.ascontiguousarray(grey, np.float32))
    small = np.asarray(picture.resize((_GRID, _GRID), Image.Resampling.BOX))
    low, high = float(small.min()), float(small.max())
    if high - low < _LEAST_CONTRAST:
        return ""
    return base64.b64encode(np.rint(between(small, low, high) * 255).astype(np.uint8).tobytes()).decode()


def _impression(pixels: NDArray[np.float32]) -> tuple[float, float, float]:
    """Colour (how far channels are apart), brightness and contrast of (H, W) or (H, W, 3), by some of its pixels."""
    height, width = pixels.shape[:2]
    some = np.atleast_3d(pixels[:: -(-height // _SEEN), :: -(-width // _SEEN)])
    colour = (some.max(axis=2) - some.min(axis=2)).mean()
    return round(float(colour), 4), round(float(some.mean()), 4), round(float(some.mean(axis=2).std()), 4)


def _edges(fingerprints: Sequence[str]) -> NDArray[np.float32]:
    """Differences of neighbours, (N, 2 x 15 x 15), each row of length 1."""
    content = b"".join(base64.b64decode(fingerprint) for fingerprint in fingerprints)
    pictures = np.frombuffer(content, np.uint8).reshape(-1, _GRID, _GRID).astype(np.float32)
    down, across = np.diff(pictures, axis=1)[:, :, :-1], np.diff(pictures, axis=2)[:, :-1]
    edges = np.stack([down, across], axis=1).reshape(len(pictures), -1)
    edges -= edges.mean(axis=1, keepdims=True)
    return edges / np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-6)
