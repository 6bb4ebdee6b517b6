"""Print how many kernels the just-in-time compiler would have to make, run of rows after run of rows, with no GPU.

A stand-in driver says that an sm_90 card is there; Triton's own launch code then specialises every launch of a forward
and a backward, and is stopped before it compiles. test_ahead_of_time.py runs this in its own process.
"""

import json

import torch
import triton
from triton.runtime.jit import JITFunction

import mor_kernels.linear
from mor_kernels import mor_linear, tables
from mor_kernels.blocks import ROW_BUCKETS, ROW_LIMITS, default_tiles
from mor_kernels.measure import StandInDriver

WIDTH, OUT = 64, 32
made: set[tuple[str, str]] = set()
launch = JITFunction.run


def remember(*args, key: str, fn, **kwargs) -> bool:
    made.add((fn.name, key))
    return True  # do not compile


def count(rows: int, ranks: tuple[int, ...], bypass: bool) -> int:
    """Distinct kernels seen so far, after a forward and a backward in both forms."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True)

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
    triton.runtime.driver.set_active(StandInDriver())
    triton.knobs.runtime.jit_cache_hook = remember
    JITFunction.run = lambda self, *args, warmup, **kwargs: launch(self, *args, warmup=True, **kwargs)
    mor_kernels.linear.INTERPRETED = True  # only so that CPU tensors are let in; nothing runs
    one_each = {key: tile._replace(stages=1 + ROW_BUCKETS.index(key[2])) for key, tile in default_tiles((9, 0)).items()}
    for name, tiles in (("defaults", default_tiles((9, 0))), ("a tile for each bucket", one_each)):
        table = tables.Table(tiles, {})
        tables.table_of = lambda device, table=table: table
        for ranks, bypass in (((2, 4, 8), True), ((4,), False)):
            made.clear()
            warm = (1576, *(limit + 904 for limit in ROW_LIMITS))
            later = (1, 16, 17, 1000, *(limit + d for limit in ROW_LIMITS for d in (-1, 0, 1)), 65536)
            print(json.dumps([name, *(count(rows, ranks, bypass) for rows in (*warm, *later))]))
