"""`matmul_tail` for cards with a tensor memory accelerator: the same product by a persistent kernel.

    out = bias + u tail + v weight

One program for each multiprocessor walks over the tiles of out. The copy engine fetches v and weight and stores out, so
that the store of one tile overlaps the loads of the next. Needs rows of a multiple of 16 bytes; `matmul_tail` asks
`can_use` first. Shapes as in `matmul_tail`.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mor_kernels.blocks import Blocks, multiprocessors, precision
from mor_kernels.ranks import dot, load_stacked, load_tile


@triton.jit(do_not_specialize=["T"])
def matmul_tail_tma_kernel(
    v, weight, u, first, second, bias, out, T, K, N,
    FIRST: tl.constexpr, SECOND: tl.constexpr, TAIL: tl.constexpr, WEIGHT_IS_NK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(T, BLOCK_T)
    column_tiles = tl.cdiv(N, BLOCK_N)
    group_size = GROUP * column_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        # The order of `matmul_tail`: down GROUP row tiles, then the next column tile.
        first_tile = tile // group_size * GROUP
        height = tl.minimum(row_tiles - first_tile, GROUP)
        row = (first_tile + tile % group_size % height) * BLOCK_T
        column = tile % group_size // height * BLOCK_N
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_T)
        columns = column + tl.arange(0, BLOCK_N)

        u_tile = load_tile(u, TAIL, rows, tl.arange(0, TAIL), T, TAIL)
        tail_tile = load_stacked(first, second, tl.arange(0, TAIL), columns, N, FIRST, SECOND).to(u_tile.dtype)
        acc = dot(u_tile, tail_tile, tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32), PRECISION)
        for k in range(0, K, BLOCK_K):
            v_tile = v.load([row, k])
            w_tile = tl.trans(weight.load([column, k])) if WEIGHT_IS_NK else weight.load([k, column])
            acc = dot(v_tile, w_tile, acc, PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]

        # In two halves, so that the store needs half the shared memory.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_T, 2, BLOCK_N // 2)), (0, 2, 1)))
        out.store([row, column], left.to(u_tile.dtype))
        out.store([row, column + BLOCK_N // 2], right.to(u_tile.dtype))


def can_use(v: Tensor, weight: Tensor, columns: int) -> bool:
    """Whether every row that the copy engine touches starts on 16 bytes."""
    size = v.element_size()
    strides = (v.stride(0), max(weight.stride()), columns)
    aligned = all(t.is_meta or t.data_ptr() % 16 == 0 for t in (v, weight))
    return aligned and all(stride * size % 16 == 0 for stride in strides) and min(weight.stride()) == 1


def matmul_tail_tma(
    v: Tensor, weight: Tensor, u: Tensor, first: Tensor, second: Tensor | None, bias: Tensor | None, out: Tensor,
    blocks: Blocks,
) -> None:  # fmt: skip
    """out = bias + u [first; second] + v weight, out (..., N) contiguous; see the head of this file."""
    rows, width = v.shape
    columns = weight.shape[1]
    weight_is_nk = weight.stride(0) == 1
    stored = weight.t() if weight_is_nk else weight
    weight_block = [blocks.columns, blocks.inner] if weight_is_nk else [blocks.inner, blocks.columns]
    programs = multiprocessors(v.device)
    matmul_tail_tma_kernel[(programs,)](
        TensorDescriptor(v, [rows, width], [v.stride(0), 1], [blocks.rows, blocks.inner]),
        TensorDescriptor(stored, list(stored.shape), [stored.stride(0), 1], weight_block),
        u, first, second, bias,
        TensorDescriptor(out, [rows, columns], [columns, 1], [blocks.rows, blocks.columns // 2]),
        rows, width, columns,
        FIRST=first.shape[0], SECOND=0 if second is None else second.shape[0], TAIL=u.shape[1],
        WEIGHT_IS_NK=weight_is_nk, HAS_BIAS=bias is not None, PRECISION=precision(v.dtype),
        BLOCK_T=blocks.rows, BLOCK_K=blocks.inner, BLOCK_N=blocks.columns, GROUP=8, PROGRAMS=programs,
        **blocks.options,
    )  # fmt: skip
