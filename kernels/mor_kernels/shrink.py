"""Shrink: one reading of x gives the rank vectors, the gates, and their product.

    h = x A^T        gates = softmax(x router_weight^T + router_bias)        gated = h * gates * scaling

Shapes: x (T, K), A (R, K), router_weight (G, K), h (T, R) in x's dtype, gates (T, G) in fp32, gated (T, P) in x's
dtype, P = R padded with zero columns, for the rank tail of `matmul_tail`.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor_kernels.blocks import Blocks, cdiv, precision
from mor_kernels.launch import Launch, decided_once
from mor_kernels.ranks import RankLayout, gate_and_save, rank_product, store_tile
from mor_kernels.tables import choose


@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    x, a, router, router_bias, h, gates, gated, T, K, stride_x,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, R: tl.constexpr, GATES: tl.constexpr, EXPERTS: tl.constexpr,
    COLS: tl.constexpr, RANK_COLS: tl.constexpr, HAS_ROUTER_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    z = rank_product(x, a, router, rows, T, K, stride_x, R, GATES, COLS, BLOCK_T, BLOCK_K, PRECISION)
    product = gate_and_save(
        z, router_bias, h, gates, rows, T, OFFSETS, SCALING, R, GATES, EXPERTS, COLS, HAS_ROUTER_BIAS
    )
    store_tile(gated, RANK_COLS, rows, tl.arange(0, COLS), T, RANK_COLS, product)


def shrink(
    x: Tensor,
    a: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    layout: RankLayout,
    h: Tensor,
    gates: Tensor,
) -> Tensor:
    """Write h and gates, both contiguous, and return gated (T, P); see the head of this file."""
    gated = x.new_empty(x.shape[0], layout.rank_columns)
    blocks = choose("shrink", x, layout.columns)
    launch = _launch(x.device, *x.shape, x.stride(0), blocks, precision(x.dtype), layout, router_bias is not None)
    launch(x, a, router_weight, router_bias, h, gates, gated)
    return gated


@decided_once
def _launch(
    device: torch.device, rows: int, width: int, stride: int, blocks: Blocks, precision: str, layout: RankLayout,
    has_router_bias: bool,
) -> Launch:  # fmt: skip
    return Launch(
        shrink_kernel, (cdiv(rows, blocks.rows),), (rows, width, stride),
        **layout.constants, COLS=layout.columns, RANK_COLS=layout.rank_columns, HAS_ROUTER_BIAS=has_router_bias,
        PRECISION=precision, BLOCK_T=blocks.rows, BLOCK_K=blocks.inner, **blocks.options,
    )  # fmt: skip
