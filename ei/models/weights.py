"""Weights on disk: reading a file without running code from it, and saying how tensors do not fit a model."""

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# Checkpoints of training scripts keep the weights under one of these, beside an optimiser's state and the like (of
# DINO's two networks, the teacher is the one to use).
WRAPPERS = ("state_dict", "model", "teacher")
# And names may begin with what the script had wrapped the model in.
PREFIXES = ("module.", "model.", "backbone.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors, .pth or .pt file, on the CPU.

    They are mapped: of a tensor, only what is looked at is read, and names and shapes cost next to nothing.

    Args:
        path: A file with a mapping of names to tensors, bare or under 'state_dict', 'model' or 'teacher'; a prefix
            'module.', 'model.' or 'backbone.' is taken off the names.

    Raises:
        ValueError: the file is missing, damaged, of another kind, or would have to be unpickled by a torch
            before 2.10, whose restricted unpickler can be made to run code (CVE-2026-24747).

    >>> safetensors.torch.save_file({"weight": torch.ones(2)}, path)  # doctest: +SKIP
    >>> read_weights(path)  # doctest: +SKIP
    {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    _require_readable(path)
    try:
        content = _read_tensors(path)
    except Exception as error:  # unpickling a damaged or foreign file can raise nearly anything
        raise ValueError(f"cannot read weights from {path}: the file is damaged or of another kind") from error
    return _named_tensors(path, content)


def _require_readable(path: Path) -> None:
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights must be a .safetensors, .pth or .pt file, got {path}")
    if path.suffix != ".safetensors" and TorchVersion(torch.__version__) < "2.10":
        raise ValueError(
            f"weights in {path.suffix} files are read only with torch >= 2.10, because older ones can be made"
            f" to run code from them, but this is torch {torch.__version__}; convert {path} to .safetensors"
        )
    if not path.is_file():
        raise ValueError(f"weights must be a file, but there is none at {path}")


def misfit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How the names and shapes of ``given`` differ from those of ``expected``; empty if they do not.

    >>> misfit({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(3), "c": torch.ones(1)})
    'missing: b; unexpected: c; of another shape: a (3,) where (2,) is expected'
    """
    reshaped = [
        f"{name} {tuple(given[name].shape)} where {tuple(tensor.shape)} is expected"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    differences = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of another shape": reshaped,
    }
    return "; ".join(f"{kind}: {_listed(names)}" for kind, names in differences.items() if names)


def _read_tensors(path: Path) -> object:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    # Checkpoints of MAE, DINO and RETFound also hold the arguments of their scripts, a class of plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        # Torch before 1.6 wrote no archives, and those alone can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    while isinstance(content, dict):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return _without_prefixes(content)
        inner = [content[wrapper] for wrapper in WRAPPERS if isinstance(content.get(wrapper), dict)]
        if len(inner) != 1:
            break
        content = inner[0]
    raise ValueError(
        f"cannot use {path} as weights: it must hold one mapping of names to tensors,"
        f" bare or under {' or '.join(map(repr, WRAPPERS))}"
    )


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        shorter = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if len(shorter) == len(tensors):
            tensors = shorter
    return tensors


def _listed(names: list[str], most: int = 8) -> str:
    more = [f"... ({len(names)} in all)"] if len(names) > most else []
    return ", ".join(names[:most] + more)
