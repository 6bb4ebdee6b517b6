"""Where a run computes, and what makes it repeatable."""

import hashlib
import random
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA, Apple's GPU, or the CPU, whichever is there first.

    Raises:
        ValueError: torch knows no such device, or it is not to be had here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def arithmetic(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The context in which a model runs: autocast for "bf16", nothing for "fp32"."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of the names and values of a module's frozen parameters and its buffers.

    A checkpoint holds trained parameters only; this tells whether they are put on the same frozen ones again.
    """
    digest = hashlib.sha256()
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    for name, tensor in sorted({**frozen, **dict(module.named_buffers())}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
