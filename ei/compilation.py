"""torch.compile for the Vision Transformers of a model, where the launching of kernels takes longer than they do."""

import torch
from torch import nn

from ei.models import Backbone

_MOST_GRAPHS = 32
"""Of a ViT: without tokens, with them, with some unseen; for the first number of images, for any and for one; each in
training and in evaluation."""


def require_compiler(device: torch.device) -> None:
    """Raise a ValueError if torch.compile does not work here: before training, not after the data have been read."""
    try:
        torch.compile(nn.functional.gelu)(torch.zeros(64, device=device))
    except Exception as error:  # whatever a compiler, or its absence, may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"compile must be 'off' where torch.compile does not work; it needs a C++ compiler on a CPU, Triton on"
            f" CUDA ({reason})"
        ) from error


def compile_backbones(model: nn.Module, compile: str) -> None:
    """Compile every ViT of ``model`` in place, each as one graph; parameters and their names stay.

    Args:
        compile: "on", or "graphs" to replay the kernels as CUDA graphs too.

    Heads and fusion stay as they are. ViTs of one shape share their graphs; the second number of images that turns
    up compiles a graph for any number.
    """
    from torch._dynamo import config  # here, because it takes a second

    # A function has room for so many graphs, and those of the stage before are not used any more.
    torch.compiler.reset()
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    mode = "reduce-overhead" if compile == "graphs" else "default"
    for backbone in (module for module in model.modules() if isinstance(module, Backbone)):
        backbone.compile(fullgraph=True, mode=mode)
