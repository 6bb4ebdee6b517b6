"""What others put around a model: the module that torch.compile gives back, peft's models and layers, and torch's for
several processes.

Nothing is imported for it: who has not imported them has no such module.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def original(model: Any) -> nn.Module:
    """The module that torch.compile was given, whose names have no prefix; any other module is given back as it is.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    compiled = _class("torch._dynamo.eval_frame", "OptimizedModule")
    return model._orig_mod if compiled is not None and isinstance(model, compiled) else model


@contextmanager
def as_written() -> Iterator[None]:
    """Compiled parts run as they were written meanwhile: what was compiled before would pass by new hooks.

    Within a function that is itself compiled nothing is changed, because torch does not allow it there; what it calls
    is compiled together with the hooks.
    """
    try:
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    except RuntimeError:
        stance = nullcontext()
    with stance:
        yield


def refuse_peft(model: nn.Module, instead: str) -> None:
    """Raise ValueError, naming what is to be used ``instead``, if peft's adapters are in the model or around it."""
    kinds = tuple(
        kind
        for kind in (_class("peft.tuners.tuners_utils", "BaseTunerLayer"), _class("peft.peft_model", "PeftModel"))
        if kind is not None
    )
    if any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError(f"this is a peft model; use {instead}")


def refuse_distributed(model: nn.Module) -> None:
    """Raise ValueError if processes share the training of the model already: they would not share new parameters'."""
    fsdp = "torch.distributed.fsdp"
    kinds = {
        "DistributedDataParallel": _class("torch.nn.parallel.distributed", "DistributedDataParallel"),
        "FullyShardedDataParallel": _class(fsdp, "FullyShardedDataParallel"),
        "fully_shard": _class(fsdp, "FSDPModule"),  # its parameters may be whole between forward and backward
    }
    wrapped = (by for module in model.modules() for by, kind in kinds.items() if kind and isinstance(module, kind))
    split = (name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor"))
    sharded = (f"fully_shard, or split otherwise ({name})," for name in split)
    if by := next(wrapped, None) or next(sharded, None):
        raise ValueError(
            f"the model was given to {by} already, which would leave new adapters out: every process would train its"
            " own; give adapters to the plain model first"
        )


def _class(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)
