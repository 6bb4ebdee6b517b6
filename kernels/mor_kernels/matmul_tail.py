"""A GEMM whose accumulator takes one extra, narrow product: the frozen matmul and the adapter in one pass.

    out = bias + u tail + v weight        forward:  v = x,  u = gated, tail = B,                weight = W^T
                                          backward: v = dy, u = dz,    tail = [A; router_weight], weight = W

Shapes: v (T, K), weight (K, N) with any strides (W is used as it is stored, both ways), u (T, P) zero-padded,
tail (R + G, N) as one or two contiguous matrices, out (T, N).
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor_kernels.blocks import Blocks, cdiv, precision
from mor_kernels.launch import Launch, decided_once
from mor_kernels.matmul_tail_tma import can_use, matmul_tail_tma
from mor_kernels.ranks import dot, load_stacked, load_tile, store_tile
from mor_kernels.tables import choose


@triton.jit(do_not_specialize=["T"])
def matmul_tail_kernel(
    v, weight, u, first, second, bias, out, T, K, N, stride_v, stride_wk, stride_wn,
    FIRST: tl.constexpr, SECOND: tl.constexpr, TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Walk down GROUP row tiles before moving to the next column tile, so that a wave shares its operands.
    row_tiles = tl.cdiv(T, BLOCK_T)
    column_tiles = tl.cdiv(N, BLOCK_N)
    group_size = GROUP * column_tiles
    first_tile = tl.program_id(0) // group_size * GROUP
    height = tl.minimum(row_tiles - first_tile, GROUP)
    row_tile = first_tile + tl.program_id(0) % group_size % height
    column_tile = tl.program_id(0) % group_size // height

    rows = row_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tail = tl.arange(0, TAIL)
    u_tile = load_tile(u, TAIL, rows, tail, T, TAIL)
    tail_tile = load_stacked(first, second, tail, columns, N, FIRST, SECOND).to(u_tile.dtype)
    acc = dot(u_tile, tail_tile, tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32), PRECISION)

    weight_columns = weight + columns.to(tl.int64)[None, :] * stride_wn
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        v_tile = load_tile(v, stride_v, rows, inner, T, K)
        inside = (inner < K)[:, None] & (columns < N)[None, :]
        w_tile = tl.load(weight_columns + inner.to(tl.int64)[:, None] * stride_wk, mask=inside, other=0.0)
        acc = dot(v_tile, w_tile, acc, PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    store_tile(out, N, rows, columns, T, N, acc)


def matmul_tail(
    v: Tensor, weight: Tensor, u: Tensor, first: Tensor, second: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    """out = bias + u [first; second] + v weight, out contiguous; see the head of this file."""
    columns = weight.shape[1]
    blocks = choose("matmul_tail", v)
    if blocks.persistent and can_use(v, weight, columns):
        matmul_tail_tma(v, weight, u, first, second, bias, out, blocks)
        return
    launch = _launch(
        v.device, *v.shape, columns, v.stride(0), weight.stride(), first.shape[0],
        0 if second is None else second.shape[0], u.shape[1], bias is not None, blocks, precision(v.dtype),
    )  # fmt: skip
    launch(v, weight, u, first, second, bias, out)


@decided_once
def _launch(
    device: torch.device, rows: int, width: int, columns: int, stride: int, weight_strides: tuple[int, int], first: int,
    second: int, tail: int, has_bias: bool, blocks: Blocks, precision: str,
) -> Launch:  # fmt: skip
    return Launch(
        matmul_tail_kernel, (cdiv(rows, blocks.rows) * cdiv(columns, blocks.columns),),
        (rows, width, columns, stride, *weight_strides),
        FIRST=first, SECOND=second, TAIL=tail, HAS_BIAS=has_bias, PRECISION=precision,
        BLOCK_T=blocks.rows, BLOCK_K=blocks.inner, BLOCK_N=blocks.columns, GROUP=8, **blocks.options,
    )  # fmt: skip
