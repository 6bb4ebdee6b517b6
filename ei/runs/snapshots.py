"""Where a stage stands, on disk: whole folders, of which the newest undamaged one counts.

A snapshot is written into a temporary folder, every file is flushed to the disk, and the folder is then renamed, so a
kill or a full disk at any instant leaves the snapshots before it. ``manifest.json`` holds the SHA-256 of every other
file; what does not match is named and passed over.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialise
from torch import Tensor

from ei.progress import say

FORMAT = "ei-snapshot-1"
MANIFEST, NOTES = "manifest.json", "notes.json"
KEPT = 2


@dataclass(frozen=True)
class Snapshot:
    """Groups of tensors by name (``tensors["optimizer"]``), and what was noted beside them (JSON types)."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    notes: dict[str, Any]


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Add a snapshot to ``folder``, whole or not at all, and remove all but the newest ones.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there is still there.
    """
    payloads = {f"{group}.safetensors": serialise(tensors) for group, tensors in snapshot.tensors.items()}
    payloads[NOTES] = json.dumps(snapshot.notes, allow_nan=False).encode()
    hashes = {name: hashlib.sha256(payload).hexdigest() for name, payload in payloads.items()}
    manifest = {"format": FORMAT, "step": snapshot.step, "sha256": hashes}
    payloads[MANIFEST] = json.dumps(manifest, indent=2).encode()

    folder.mkdir(parents=True, exist_ok=True)
    _remove_litter(folder)
    temporary = folder / f".tmp-{snapshot.step}-{os.getpid()}"
    try:
        temporary.mkdir()
        for name, payload in payloads.items():
            with open(temporary / name, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
        _flush(temporary)
        final = folder / _name(snapshot.step)
        if final.exists():  # a damaged one, or it would have been resumed from
            _remove(final)
        os.replace(temporary, final)
        _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _snapshots(folder)[KEPT:]:
        _remove(old)


def newest_snapshot(folder: Path) -> Snapshot | None:
    """The newest snapshot that is whole; None if there is none. Damaged ones are said by name."""
    for path in _snapshots(folder):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            say(f"{path} is damaged ({_reason(error)}), the one before it is used")
    return None


def _read(path: Path) -> Snapshot:
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, not {FORMAT}")
    if _name(manifest["step"]) != path.name:
        raise ValueError(f"it is of step {manifest['step']}")
    payloads = {}
    for name, expected in manifest["sha256"].items():
        payloads[name] = (path / name).read_bytes()
        if hashlib.sha256(payloads[name]).hexdigest() != expected:
            raise ValueError(f"{name} does not have the hash it was written with")
    notes = json.loads(payloads.pop(NOTES))
    tensors = {name.removesuffix(".safetensors"): load_tensors(payload) for name, payload in payloads.items()}
    return Snapshot(manifest["step"], tensors, notes)


def _snapshots(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _remove_litter(folder: Path) -> None:
    """What a killed process has left half written or half removed."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    # Renamed first: a kill while its files go must not leave a snapshot that looks damaged.
    doomed = path.with_name(f".tmp-old-{path.name}-{os.getpid()}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Put the names in a folder on the disk; Windows has no such thing."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror}: {Path(error.filename).name}" if error.filename else str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"{MANIFEST} is no JSON"
    return str(error) if isinstance(error, ValueError) else f"{MANIFEST} lacks {error}"
