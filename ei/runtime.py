"""Where a run computes, and what makes it repeatable."""

import math
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's generators stand, of the CPU and of ``device``; what is trained here uses no others."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of :func:`random_state`; a generator that has no state there is left alone."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def environment(device: torch.device) -> dict[str, str]:
    """What the last bits of a result depend on besides the settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "device": name, "threads": str(torch.get_num_threads())}


def peak_memory(device: torch.device) -> float:
    """GiB that tensors have taken on a GPU at most; on other devices, that this process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def arithmetic(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The context in which a model runs: autocast for "bf16" and "fp16", nothing for "fp32"."""
    if precision in _NARROW:
        return torch.autocast(device.type, dtype=_NARROW[precision])
    return nullcontext()


def narrow_frozen(module: nn.Module, precision: str) -> None:
    """Hold frozen weights of linear layers and convolutions in the dtype to which :func:`arithmetic` casts them.

    Autocast would cast them anew in every step, because it keeps only the casts of weights that want a gradient.
    The results are the same bits, in half the memory. Layers that a method of huggingface/peft has adapted stay as they
    are: some compute with the weight itself, and all make their parameters in its dtype.
    """
    if precision not in _NARROW:
        return
    of_peft = {inner for layer in module.modules() if hasattr(layer, "base_layer") for inner in layer.modules()}
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer not in of_peft:
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(_NARROW[precision])


def fingerprint(module: nn.Module) -> dict[str, list[float]]:
    """Sum and norm of every frozen parameter and buffer, by name, in fp64.

    A checkpoint holds trained parameters only; this tells whether they are put on the same frozen ones again.
    It is no hash, because resized position embeddings and random weights differ in the last bits between processors.
    """
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    tensors = sorted({**frozen, **dict(module.named_buffers())}.items())
    return {name: [tensor.double().sum().item(), tensor.double().norm().item()] for name, tensor in tensors}


def same_weights(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
    """Whether two fingerprints are of the same weights, up to rounding."""
    return one.keys() == other.keys() and all(
        math.isclose(one[name][1], other[name][1], rel_tol=1e-5)
        # Rounding errors of a sum grow with the norm; another draw of the weights differs by about all of it.
        and abs(one[name][0] - other[name][0]) <= 1e-3 * one[name][1]
        for name in one
    )
