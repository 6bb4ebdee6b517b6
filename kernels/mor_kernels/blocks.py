"""Tile shapes and the form of the operator, from small tables that ship with the package.

There is no autotuner. Nothing is timed at run time, so nothing can happen inside a graph capture, the same call
runs the same program every time, and a number of rows never seen before compiles nothing new. README.md says
which entries have been measured and which were only compiled.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALL_ROWS = 4096  # below this many rows a kernel is short of programs rather than of bandwidth


@dataclass(frozen=True)
class Blocks:
    """One tile: `rows` x `columns` of the result, `inner` steps of the summed side, two compiler options."""

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


# (kernel, kind of problem) is the tile for any card, (kernel, kind, capability) replaces it on one. Kinds: "few" and
# "many" rows of 16-bit elements, and "fp32". weight_grad sums over rows: its `inner` counts rows.
TABLE: dict[tuple, Blocks] = {
    ("shrink", "few"): Blocks(rows=16, inner=256),
    ("shrink", "many"): Blocks(rows=64, inner=128),
    ("shrink", "fp32"): Blocks(rows=32, inner=64),
    ("branch", "few"): Blocks(rows=16, inner=256, columns=256),
    ("branch", "many"): Blocks(rows=64, inner=128, columns=128),
    ("branch", "fp32"): Blocks(rows=32, inner=64, columns=64),
    ("dy_side", "few"): Blocks(rows=16, inner=256, columns=256),
    ("dy_side", "many"): Blocks(rows=64, inner=128, columns=128),
    ("dy_side", "fp32"): Blocks(rows=32, inner=64, columns=64),
    ("weight_grad", "few"): Blocks(rows=0, inner=64, columns=128),
    ("weight_grad", "many"): Blocks(rows=0, inner=64, columns=128),
    ("weight_grad", "fp32"): Blocks(rows=0, inner=32, columns=64),
    ("matmul_tail", "few"): Blocks(rows=64, inner=64, columns=128),
    ("matmul_tail", "many"): Blocks(rows=128, inner=64, columns=128, warps=8),
    ("matmul_tail", "fp32"): Blocks(rows=64, inner=16, columns=64, warps=8),
    ("matmul_tail", "few", (9, 0)): Blocks(rows=128, inner=64, columns=128, stages=4),
    ("matmul_tail", "many", (9, 0)): Blocks(rows=128, inner=64, columns=256, warps=8),
}

# (capability, dtype, K, O, "few" or "many" rows) -> form, where a measurement has shown the winner. None has yet.
FORMS: dict[tuple, str] = {}


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of the card; None in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def kind(x: Tensor) -> str:
    """Which entries of the table x (T, ...) falls under."""
    if x.element_size() == 4:
        return "fp32"
    return "few" if x.shape[0] < SMALL_ROWS else "many"


def choose(kernel: str, x: Tensor, rank_columns: int = 0) -> Blocks:
    """The tile for this kernel on x (T, ...)'s card, dtype and number of rows.

    A wide rank side (over 32 columns) halves the tile's other two sides, or it would not fit the smaller chips.
    """
    key = (kernel, kind(x))
    blocks = TABLE.get((*key, capability(x.device)), TABLE[key])
    if rank_columns > 32:
        blocks = replace(blocks, inner=blocks.inner // 2, columns=blocks.columns // 2)
    return blocks


def choose_form(x: Tensor, columns: int) -> str:
    """The form measured to win for x (T, K) and O columns on this card; elsewhere "branch", which leaves the large
    GEMM to the library."""
    return FORMS.get((capability(x.device), x.dtype, x.shape[1], columns, kind(x)), "branch")


def precision(x: Tensor) -> str:
    """How the small dots treat fp32 operands: as torch's own matmul does. It does not touch 16-bit operands."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def slice_rows(rows: int, column_blocks: int, multiple: int, row_bytes: int = 0) -> int:
    """Rows per slice of a split sum over T, a pure function of sizes: two runs add in the same order.

    Enough slices to fill the card (264 programs: two for each multiprocessor of an H100), none shorter than 128
    rows; with `row_bytes`, also none over 8 MB, so that whoever reads it second finds it in the L2 cache.
    """
    slices = max(-(-264 // column_blocks), -(-rows * row_bytes // 2**23))
    slices = max(1, min(slices, rows // 128))
    per_slice = -(-rows // slices)
    return -(-per_slice // multiple) * multiple
