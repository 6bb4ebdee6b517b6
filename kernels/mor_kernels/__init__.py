"""Fused Triton operators for the Mixture-of-Ranks linear layer.

This package knows torch and triton and nothing else; `kernels/README.md` has the mathematics, the shapes and the
limits. Without triton it still imports: `is_available()` is then False and `mor_linear` raises.
"""

from typing import Any

import torch

from mor_kernels.tables import prefers_library

try:
    from mor_kernels import flops  # noqa: F401 (registers what the operators count for)
    from mor_kernels.linear import MAX_COLUMNS, mor_linear
    from mor_kernels.ranks import INTERPRETED

    _HAS_TRITON = True
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    _HAS_TRITON = False
    INTERPRETED = False
    MAX_COLUMNS = 64

    def mor_linear(*args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[misc]
        """Stand-in where triton is not installed."""
        raise RuntimeError("mor_kernels.mor_linear needs triton, which is not installed; use mor.mor_linear")


__all__ = ["MAX_COLUMNS", "is_available", "mor_linear", "prefers_library"]


def is_available(device: torch.device | None = None) -> bool:
    """Whether the kernels run on ``device`` (default: on CUDA's current one): triton is installed, and the device is
    a CUDA card of compute capability 8.0 or newer, or, in the interpreter (TRITON_INTERPRET=1), any."""
    if not _HAS_TRITON:
        return False
    if INTERPRETED:
        return True
    if device is not None and device.type != "cuda":
        return False
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
