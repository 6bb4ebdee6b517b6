"""Branch: the whole adapter and the bias in one reading of x and one writing of y.

    y0 = bias + (h * gates * scaling) B        with h and gates as in `shrink`

The frozen product is then added in place, `y0.addmm_(x, weight.T)`, so the large GEMM stays with the library.

Shapes: x (T, K), A (R, K), B (R, O), bias (O,), y0 (T, O), h (T, R) in x's dtype, gates (T, G) in fp32.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor_kernels.blocks import Blocks, cdiv, precision
from mor_kernels.launch import Launch, decided_once
from mor_kernels.ranks import RankLayout, dot, gate_and_save, load_stacked, rank_product, store_tile
from mor_kernels.tables import choose


@triton.jit(do_not_specialize=["T"])
def branch_kernel(
    x, a, router, router_bias, b, bias, y, h, gates, T, K, O, stride_x,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, R: tl.constexpr, GATES: tl.constexpr, EXPERTS: tl.constexpr,
    COLS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROUTER_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    z = rank_product(x, a, router, rows, T, K, stride_x, R, GATES, COLS, BLOCK_T, BLOCK_K, PRECISION)
    gated = gate_and_save(
        z, router_bias, h, gates, rows, T, OFFSETS, SCALING, R, GATES, EXPERTS, COLS, HAS_ROUTER_BIAS
    ).to(y.dtype.element_ty)
    for start in range(0, O, BLOCK_O):
        out = start + tl.arange(0, BLOCK_O)
        b_tile = load_stacked(b, b, tl.arange(0, COLS), out, O, R, 0).to(gated.dtype)
        tile = dot(gated, b_tile, tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32), PRECISION)
        if HAS_BIAS:
            tile += tl.load(bias + out, mask=out < O, other=0.0).to(tl.float32)[None, :]
        store_tile(y, O, rows, out, T, O, tile)


def branch(
    x: Tensor,
    a: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    b: Tensor,
    bias: Tensor | None,
    layout: RankLayout,
    y: Tensor,
    h: Tensor,
    gates: Tensor,
) -> None:
    """Write y0 into y, h and gates, all contiguous; see the head of this file."""
    launch = _launch(
        x.device, *x.shape, b.shape[1], x.stride(0), choose("branch", x, layout.columns), precision(x.dtype), layout,
        bias is not None, router_bias is not None,
    )  # fmt: skip
    launch(x, a, router_weight, router_bias, b, bias, y, h, gates)


@decided_once
def _launch(
    device: torch.device, rows: int, width: int, out_width: int, stride: int, blocks: Blocks, precision: str,
    layout: RankLayout, has_bias: bool, has_router_bias: bool,
) -> Launch:  # fmt: skip
    return Launch(
        branch_kernel, (cdiv(rows, blocks.rows),), (rows, width, out_width, stride),
        **layout.constants, COLS=layout.columns, HAS_BIAS=has_bias, HAS_ROUTER_BIAS=has_router_bias,
        PRECISION=precision, BLOCK_T=blocks.rows, BLOCK_K=blocks.inner, BLOCK_O=blocks.columns, **blocks.options,
    )  # fmt: skip
