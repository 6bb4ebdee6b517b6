"""All that the backward needs from dy, in one launch: rank-side gradients row by row, and dB slice by slice.

    d = dy B^T                                   gradient of gated
    dh = d * gates * scaling
    dgate_i = scaling_i * sum of (d * h) over the columns of expert i;  0 for the bypass
    dlogits = gates * (dgates - sum(gates * dgates))
    dz = [dh | dlogits]                          zero-padded to COLS
    dx0 = dz [A; router_weight]                  on request; then `dx0.addmm_(dy, weight)`
    dB = gated^T dy                              as partial sums, see `weight_grad`

dB needs only what the forward saved, not dz, so its programs stand in the same launch: for every slice of rows,
first the programs that make dz, then those that make dB, which find the slice of dy in the L2 cache.

Shapes: dy (T, O), B (R, O), h (T, R), gates (T, G), dz (T, COLS) in dy's dtype, dx0 (T, K), S slices.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor_kernels.blocks import Blocks, cdiv, precision, slice_rows
from mor_kernels.launch import Launch, decided_once
from mor_kernels.ranks import RankLayout, dot, load_stacked, load_tile, saved_factor, store_tile
from mor_kernels.tables import choose
from mor_kernels.weight_grad import db_slice


@triton.jit
def dz_rows(
    dy, b, h, gates, a, router, dz, dx, partial_bias, program, rows, T, O, K, stride_dy,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, R: tl.constexpr, GATES: tl.constexpr, EXPERTS: tl.constexpr,
    COLS: tl.constexpr, WITH_DX: tl.constexpr, WITH_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz, the partial sum of d router_bias and, on request, dx0, for BLOCK_T rows."""
    columns = tl.arange(0, COLS)
    d = tl.zeros((BLOCK_T, COLS), dtype=tl.float32)
    for start in range(0, O, BLOCK_O):
        out = start + tl.arange(0, BLOCK_O)
        dy_tile = load_tile(dy, stride_dy, rows, out, T, O)
        b_tile = load_stacked(b, b, columns, out, O, R, 0).to(dy_tile.dtype)
        d = dot(dy_tile, tl.trans(b_tile), d, PRECISION)

    result = d * saved_factor(gates, rows, T, OFFSETS, SCALING, R, GATES, EXPERTS, COLS, BLOCK_T)
    if GATES > 0:
        product = d * load_tile(h, R, rows, columns, T, R).to(tl.float32)
        dgates = tl.zeros_like(d)
        for i in tl.static_range(EXPERTS):
            own = (columns >= OFFSETS[i]) & (columns < OFFSETS[i + 1])
            dgate = tl.sum(tl.where(own[None, :], product, 0.0), axis=1) * SCALING[i]
            dgates += tl.where((columns == R + i)[None, :], dgate[:, None], 0.0)
        is_gate = (columns >= R) & (columns < R + GATES)
        inside = (rows < T)[:, None] & is_gate[None, :]
        g = tl.load(gates + rows[:, None] * GATES + (columns - R)[None, :], mask=inside, other=0.0)
        dlogits = g * (dgates - tl.sum(g * dgates, axis=1)[:, None])
        result = tl.where(is_gate[None, :], dlogits, result)
        if WITH_WEIGHTS:
            bias_sum = tl.sum(tl.where(is_gate[None, :], dlogits, 0.0), axis=0)
            tl.store(partial_bias + program.to(tl.int64) * GATES + columns - R, bias_sum, mask=is_gate)

    dz_tile = result.to(dz.dtype.element_ty)
    store_tile(dz, COLS, rows, columns, T, COLS, dz_tile)
    if WITH_DX:
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            w_tile = load_stacked(a, router, columns, inner, K, R, GATES).to(dz_tile.dtype)
            dx_tile = dot(dz_tile, w_tile, tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32), PRECISION)
            store_tile(dx, K, rows, inner, T, K, dx_tile)


@triton.jit(do_not_specialize=["T"])
def dy_side_kernel(
    dy, b, h, gates, a, router, dz, dx, partial_b, partial_bias, T, O, K, stride_dy, slice_rows,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, R: tl.constexpr, GATES: tl.constexpr, EXPERTS: tl.constexpr,
    COLS: tl.constexpr, RANK_COLS: tl.constexpr, WITH_DX: tl.constexpr, WITH_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICE_T: tl.constexpr, SLICE_D: tl.constexpr,
):  # fmt: skip
    row_programs = slice_rows // BLOCK_T
    programs = row_programs
    if WITH_WEIGHTS:
        programs += tl.cdiv(O, SLICE_D)
    index = tl.program_id(0) // programs
    role = tl.program_id(0) % programs
    if role < row_programs:
        program = index * row_programs + role
        rows = program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        dz_rows(
            dy, b, h, gates, a, router, dz, dx, partial_bias, program, rows, T, O, K, stride_dy,
            OFFSETS, SCALING, R, GATES, EXPERTS, COLS, WITH_DX, WITH_WEIGHTS, PRECISION,
            BLOCK_T, BLOCK_O, BLOCK_K,
        )  # fmt: skip
    else:
        if WITH_WEIGHTS:
            db_slice(
                dy, h, gates, partial_b, index, role - row_programs, T, O, stride_dy, slice_rows,
                OFFSETS, SCALING, R, GATES, EXPERTS, RANK_COLS, PRECISION, SLICE_T, SLICE_D,
            )  # fmt: skip


def dy_side(
    dy: Tensor,
    b: Tensor,
    h: Tensor,
    gates: Tensor,
    a: Tensor,
    router_weight: Tensor | None,
    layout: RankLayout,
    *,
    dx: Tensor | None,
    with_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz (T, COLS), partial dB (S, R, O) and partial d router_bias (programs, G); dx0 into dx, where one is given.

    The partial sums are None unless `with_weights`. See the head of this file.
    """
    rows, out_width = dy.shape
    launch, slices, row_programs = _launch(
        dy.device, rows, out_width, a.shape[1], dy.stride(0), dy.element_size(),
        choose("dy_side", dy, layout.columns), choose("weight_grad", dy), precision(dy.dtype), layout,
        dx is not None, with_weights,
    )  # fmt: skip
    dz = dy.new_empty(rows, layout.columns)
    partial_b = partial_bias = None
    if with_weights:
        partial_b = dy.new_empty(slices, layout.rank_sum, out_width, dtype=torch.float32)
        partial_bias = dy.new_empty(slices * row_programs, layout.gates, dtype=torch.float32)
    launch(dy, b, h, gates, a, router_weight, dz, dx, partial_b, partial_bias)
    return dz, partial_b, partial_bias


@decided_once
def _launch(
    device: torch.device, rows: int, out_width: int, width: int, stride: int, element_size: int,
    blocks: Blocks, sums: Blocks, precision: str, layout: RankLayout, with_dx: bool, with_weights: bool,
) -> tuple[Launch, int, int]:  # fmt: skip
    """Beside the launch: the number of slices, and how many programs for rows each of them has."""
    column_programs = cdiv(out_width, sums.columns)
    per_slice = slice_rows(rows, column_programs, max(blocks.rows, sums.inner), out_width * element_size)
    slices = cdiv(rows, per_slice)
    row_programs = per_slice // blocks.rows
    programs = row_programs + (column_programs if with_weights else 0)
    launch = Launch(
        dy_side_kernel, (slices * programs,), (rows, out_width, width, stride, per_slice),
        **layout.constants, COLS=layout.columns, RANK_COLS=layout.rank_columns, WITH_DX=with_dx,
        WITH_WEIGHTS=with_weights, PRECISION=precision, BLOCK_T=blocks.rows, BLOCK_O=blocks.inner,
        BLOCK_K=blocks.columns, SLICE_T=sums.inner, SLICE_D=sums.columns, **blocks.options,
    )  # fmt: skip
    return launch, slices, row_programs
