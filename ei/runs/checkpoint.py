"""A run's trained parameters on disk: one safetensors file, written whole and checked when read.

Frozen weights are never written; the file holds a fingerprint of them instead.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ei.models.weights import misfit
from mor import trainable_parameters
from mor.files import write_atomically

FORMAT = "ei-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """Trained parameters by name, and what was noted beside them (JSON types)."""

    parameters: dict[str, Tensor]
    notes: dict[str, Any]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy, on the CPU, of every parameter that is trained."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trainable_parameters(model).items()}


def restore(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copy trained parameters back.

    Raises:
        ValueError: names or shapes differ from the model's; all of them in one message, and nothing is changed.
    """
    own = trainable_parameters(model)
    if problems := misfit(own, parameters):
        raise ValueError(f"the checkpoint does not fit the model: {problems}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimiser remembers, as tensors by ``NUMBER.NAME`` (copies on the CPU) and as JSON types."""
    tensors, others = {}, {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().clone()
            else:
                others[f"{number}.{name}"] = value
    return tensors, others


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], others: Mapping[str, Any]
) -> None:
    """The inverse of :func:`optimizer_state`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **others}.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def write_checkpoint(path: Path, parameters: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write one file, whole or not at all; ``notes`` must be JSON types."""
    metadata = {"format": FORMAT, "notes": json.dumps(notes), "sha256": _digest(parameters)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, serialise(dict(parameters), metadata=metadata))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what :func:`write_checkpoint` wrote.

    Raises:
        ValueError: the file is missing, damaged or of another kind; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parameters = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this package")
    if metadata.get("sha256") != _digest(parameters):
        raise ValueError(f"the checkpoint {path} is damaged: its contents do not have the hash it was written with")
    return Checkpoint(parameters, json.loads(metadata["notes"]))


def _digest(parameters: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
