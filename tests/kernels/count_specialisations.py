"""Print how many kernels the just-in-time compiler would have to make, run of rows after run of rows, with no GPU.

A stand-in driver says that an sm_90 card is there; Triton's own launch code then specialises every launch of a forward
and a backward, and is stopped before it compiles. test_ahead_of_time.py runs this in its own process.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import mor_kernels.linear
from mor_kernels import mor_linear
from mor_kernels.blocks import SMALL_ROWS

WIDTH, OUT = 768, 256
made: set[tuple[str, str]] = set()
launch = JITFunction.run


class Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def remember(*args, key: str, fn, **kwargs) -> bool:
    made.add((fn.name, key))
    return True  # do not compile


def count(rows: int, ranks: tuple[int, ...], bypass: bool) -> int:
    """Distinct kernels seen so far, after a forward and a backward in both forms."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)

    gates = len(ranks) + 1 if bypass else 0
    router = (leaf(gates, WIDTH), leaf(gates)) if gates else (None, None)
    a, b = leaf(sum(ranks), WIDTH), leaf(sum(ranks), OUT)
    weight, bias = leaf(OUT, WIDTH).detach(), leaf(OUT).detach()
    for form in ("branch", "tail"):
        y = mor_linear(
            leaf(rows, WIDTH), weight, bias, a, b, *router,
            ranks=ranks, scaling=[2.0] * len(ranks), bypass=bypass, form=form,
        )  # fmt: skip
        y.backward(torch.zeros_like(y))
    return len(made)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = remember
    JITFunction.run = lambda self, *args, warmup, **kwargs: launch(self, *args, warmup=True, **kwargs)
    mor_kernels.linear.INTERPRETED = True  # only so that CPU tensors are let in; nothing runs
    for ranks, bypass in (((2, 4, 8), True), ((4,), False)):
        for rows in (1576, SMALL_ROWS + 904, 1, 16, 17, 1000, SMALL_ROWS - 1, SMALL_ROWS, SMALL_ROWS + 1, 6288):
            print(count(rows, ranks, bypass), end=" ")
        print()
