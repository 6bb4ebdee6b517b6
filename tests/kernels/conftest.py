"""Kernel tests run on a CUDA card where there is one, and in Triton's interpreter on the CPU elsewhere.

Triton reads TRITON_INTERPRET when it is imported and when a kernel is defined, so it is set here, before both.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and "mor_kernels" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))  # for mor_problem.py, beside this

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="session")
def kernels_can_run() -> None:
    pytest.importorskip("triton")
    import mor_kernels

    assert mor_kernels.is_available(), (
        "triton or mor_kernels was imported before TRITON_INTERPRET=1 was set: set it in the top conftest or the shell"
    )


@pytest.fixture(autouse=True, scope="session")
def interpreter_works(kernels_can_run: None) -> None:
    """Triton 3.6 makes integers of arrays of one element, which numpy 2.5 has forbidden."""
    import numpy
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def fill(out, count):
        for i in range(count):
            tl.store(out + i, 1.0)

    try:
        fill[(1,)](torch.zeros(3, device=DEVICE), 3)
    except InterpreterError:
        pytest.skip(f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised buffer that the operators ask for starts as NaN, so an element nobody writes shows."""

    def poisoned(empty):
        def poisoned_empty(*args, **kwargs):
            out = empty(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and out.device.type in ("cpu", "cuda") else out

        return poisoned_empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(params=["shipped tiles", "smallest tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with the tiles that ship, once with 16 x 16 x 16 ones, so that small sizes still make many tiles."""
    from mor_kernels import blocks, tables

    if request.param == "smallest tiles":
        tiny = blocks.Blocks(rows=16, inner=16, columns=16)
        table = tables.Table(dict.fromkeys(blocks.default_tiles(None), tiny), {})
        monkeypatch.setattr(tables, "table_of", lambda device: table)
    return request.param


@pytest.fixture
def surrounded() -> Callable[[torch.Tensor], torch.Tensor]:
    """The same matrix as a slice of a larger one full of NaN, so that a read outside its bounds shows."""

    def surround(t: torch.Tensor) -> torch.Tensor:
        if t.dim() != 2:
            big = t.new_full((t.numel() + 128,), float("nan"))
            return big[64 : 64 + t.numel()].copy_(t.flatten()).view(t.shape)
        big = t.new_full((t.shape[0] + 2, t.shape[1] + 48), float("nan"))
        inner = big[1:-1, 16:-32]
        return inner.copy_(t)

    return surround
