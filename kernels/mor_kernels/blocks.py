"""Tiles: what a tile is, the ones that suit any card, and which kind of problem a call is.

There is no autotuner. Nothing is timed at run time, so nothing can happen inside a graph capture, the same call
runs the same program every time, and a number of rows never seen before compiles nothing new. What was measured on
one card stands in `tables.py`; README.md says what that is so far.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

# A call falls into the bucket of the first limit above its number of rows, and of None beyond the last: 1,576 tokens
# (8 images of 197), 6,288 (8 of 786), 12,608 (64 of 197) and 65,536 fall into one each.
ROW_LIMITS = (4096, 8192, 32768)
ROW_BUCKETS = (*ROW_LIMITS, None)
FEW_ROWS = ROW_LIMITS[0]  # below this many rows a kernel is short of programs rather than of bandwidth

KINDS = ("16-bit", "fp32")
KERNELS = ("shrink", "branch", "dy_side", "weight_grad", "matmul_tail")


class Blocks(NamedTuple):
    """One tile: `rows` x `columns` of the result, `inner` steps of the summed side, two compiler options.

    weight_grad sums over rows: its `inner` counts rows, and it has no `rows`. shrink has no `columns`.
    """

    rows: int
    inner: int
    columns: int = 0
    warps: int = 4
    stages: int = 3
    persistent: bool = False  # matmul_tail only: the version with the copy engine, on sm_90 and newer

    @property
    def options(self) -> dict[str, int | bool]:
        # Fused multiply-add is asked for by name: Triton's default for it is about to change.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


TileKey = tuple[str, str, int | None]  # kernel, kind of elements, row bucket

# (kernel, kind of problem) is the tile for any card, (kernel, kind, capability) replaces it on one.
DEFAULTS: dict[tuple, Blocks] = {
    ("shrink", "few"): Blocks(rows=16, inner=256),
    ("shrink", "many"): Blocks(rows=64, inner=128),
    ("shrink", "fp32"): Blocks(rows=32, inner=64),
    ("branch", "few"): Blocks(rows=16, inner=256, columns=256),
    ("branch", "many"): Blocks(rows=64, inner=128, columns=128),
    ("branch", "fp32"): Blocks(rows=32, inner=64, columns=64, warps=8),
    ("dy_side", "few"): Blocks(rows=16, inner=256, columns=256),
    ("dy_side", "many"): Blocks(rows=64, inner=128, columns=128),
    ("dy_side", "fp32"): Blocks(rows=32, inner=64, columns=64),
    ("weight_grad", "few"): Blocks(rows=0, inner=64, columns=128),
    ("weight_grad", "many"): Blocks(rows=0, inner=64, columns=128),
    ("weight_grad", "fp32"): Blocks(rows=0, inner=32, columns=64),
    ("matmul_tail", "few"): Blocks(rows=64, inner=64, columns=128),
    ("matmul_tail", "many"): Blocks(rows=128, inner=64, columns=128, warps=8),
    ("matmul_tail", "fp32"): Blocks(rows=64, inner=16, columns=64, warps=8),
    ("dy_side", "many", (10, 0)): Blocks(rows=64, inner=128, columns=64),
    ("matmul_tail", "few", (9, 0)): Blocks(rows=128, inner=64, columns=128, stages=4),
    ("matmul_tail", "many", (9, 0)): Blocks(rows=128, inner=64, columns=256, warps=8),
}


def default_tiles(capability: tuple[int, int] | None) -> Mapping[TileKey, Blocks]:
    """A tile for every kernel, kind and bucket on a card of this compute capability; None stands for no card."""
    tiles: dict[TileKey, Blocks] = {}
    for kernel in KERNELS:
        for kind in KINDS:
            for bucket in ROW_BUCKETS:
                problem = "fp32" if kind == "fp32" else "few" if bucket == FEW_ROWS else "many"
                key = (kernel, problem, capability)
                tiles[kernel, kind, bucket] = DEFAULTS.get(key, DEFAULTS[kernel, problem])
    return tiles


def row_bucket(rows: int) -> int | None:
    """The first of ROW_LIMITS that is above `rows`; None beyond the last.

    Plain comparisons: torch.compile turns them into guards on a symbolic number of rows.
    """
    for limit in ROW_LIMITS:
        if rows < limit:
            return limit
    return None


def kind(dtype: torch.dtype) -> str:
    """fp16 and bf16 share their tiles."""
    return "fp32" if dtype.itemsize == 4 else "16-bit"


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def precision(dtype: torch.dtype) -> str:
    """How the small dots treat fp32 operands: as torch's own matmul does. 16-bit ones have one way alone."""
    return "tf32" if dtype.itemsize == 4 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def cdiv(total: int, size: int) -> int:
    """How many tiles of `size` cover `total`. Triton's own is also a function of its language, and takes longer."""
    return -(-total // size)


def slice_rows(rows: int, column_blocks: int, multiple: int, row_bytes: int = 0) -> int:
    """Rows per slice of a split sum over T, a pure function of sizes: two runs add in the same order.

    Enough slices to fill the card (264 programs: two for each multiprocessor of an H100), none shorter than 128
    rows; with `row_bytes`, also none over 8 MB, so that whoever reads it second finds it in the L2 cache.
    """
    slices = max(cdiv(264, column_blocks), cdiv(rows * row_bytes, 2**23))
    slices = max(1, min(slices, rows // 128))
    return cdiv(cdiv(rows, slices), multiple) * multiple
