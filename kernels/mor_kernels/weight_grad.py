"""Gradients of the small matrices: sums over all rows, in slices of fixed order.

    dB = gated^T dy        d[A; router_weight] = dz^T x        d router_bias = sum over rows of d logits

Each program sums one slice of rows into its own partial result in fp32; `sum_partials` then adds the slices in
order. No atomics: the same input gives the same bits. The dB programs run in `dy_side`, beside the readers of dy.

Shapes: dy (T, O), x (T, K), h (T, R), gates (T, G), dz (T, COLS) zero-padded, S slices.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor_kernels.blocks import Blocks, cdiv, precision, slice_rows
from mor_kernels.launch import Launch, decided_once
from mor_kernels.ranks import RankLayout, dot, load_tile, power_of_two, saved_factor, store_tile
from mor_kernels.tables import choose


@triton.jit
def db_slice(
    dy, h, gates, partial, index, block, T, O, stride_dy, slice_rows,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, R: tl.constexpr, GATES: tl.constexpr, EXPERTS: tl.constexpr,
    RANK_COLS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[index, :, block] = gated^T dy over the rows of one slice."""
    columns = tl.arange(0, RANK_COLS)
    out = block * BLOCK_D + tl.arange(0, BLOCK_D)
    first = index.to(tl.int64) * slice_rows
    acc = tl.zeros((RANK_COLS, BLOCK_D), dtype=tl.float32)
    for start in range(0, slice_rows, BLOCK_T):
        rows = first + start + tl.arange(0, BLOCK_T)
        dy_tile = load_tile(dy, stride_dy, rows, out, T, O)
        h_tile = load_tile(h, R, rows, columns, T, R).to(tl.float32)
        factor = saved_factor(gates, rows, T, OFFSETS, SCALING, R, GATES, EXPERTS, RANK_COLS, BLOCK_T)
        acc = dot(tl.trans((h_tile * factor).to(dy_tile.dtype)), dy_tile, acc, PRECISION)
    store_tile(partial + index.to(tl.int64) * R * O, O, columns, out, R, O, acc)


@triton.jit(do_not_specialize=["T"])
def weight_grad_kernel(
    x, dz, partial, T, K, stride_x, slice_rows,
    STACKED: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLS)
    inner = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    index = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((COLS, BLOCK_D), dtype=tl.float32)
    for start in range(0, slice_rows, BLOCK_T):
        rows = index * slice_rows + start + tl.arange(0, BLOCK_T)
        x_tile = load_tile(x, stride_x, rows, inner, T, K)
        dz_tile = load_tile(dz, COLS, rows, columns, T, COLS)
        acc = dot(tl.trans(dz_tile), x_tile, acc, PRECISION)
    store_tile(partial + index * STACKED * K, K, columns, inner, STACKED, K, acc)


@triton.jit
def column_sums(partial, count, width, columns, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the first axis of partial (count, width), for some of its columns."""
    acc = tl.zeros((DEPTH, BLOCK), dtype=tl.float32)
    for start in range(0, count, DEPTH):
        index = (start + tl.arange(0, DEPTH)).to(tl.int64)
        acc += load_tile(partial, width, index, columns, count, width)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["slices_b", "slices_x", "programs_bias"])
def sum_partials_kernel(
    partial_b, partial_x, partial_bias, db, da, drouter, drouter_bias,
    slices_b, slices_x, programs_bias, size_b, size_a, size_x,
    GATES: tl.constexpr, GATE_COLS: tl.constexpr, WITH_BIAS: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b_blocks = tl.cdiv(size_b, BLOCK)
    x_blocks = tl.cdiv(size_x, BLOCK)
    if program < b_blocks:
        columns = program * BLOCK + tl.arange(0, BLOCK)
        total = column_sums(partial_b, slices_b, size_b, columns, DEPTH, BLOCK)
        tl.store(db + columns, total.to(db.dtype.element_ty), mask=columns < size_b)
    elif program < b_blocks + x_blocks:
        columns = (program - b_blocks) * BLOCK + tl.arange(0, BLOCK)
        total = column_sums(partial_x, slices_x, size_x, columns, DEPTH, BLOCK)
        tl.store(da + columns, total.to(da.dtype.element_ty), mask=columns < size_a)
        if GATES > 0:
            in_router = (columns >= size_a) & (columns < size_x)
            tl.store(drouter + columns - size_a, total.to(drouter.dtype.element_ty), mask=in_router)
    else:
        if WITH_BIAS:
            gate = tl.arange(0, GATE_COLS)
            bias_total = column_sums(partial_bias, programs_bias, GATES, gate, 256, GATE_COLS)
            tl.store(drouter_bias + gate, bias_total.to(drouter_bias.dtype.element_ty), mask=gate < GATES)


def x_partials(x: Tensor, dz: Tensor, layout: RankLayout) -> Tensor:
    """(S, R + G, K): dz^T x, slice by slice."""
    rows, width = x.shape
    launch, slices = _launch_x(x.device, rows, width, x.stride(0), choose("weight_grad", x), precision(x.dtype), layout)
    partial = x.new_empty(slices, layout.rank_sum + layout.gates, width, dtype=torch.float32)
    launch(x, dz, partial)
    return partial


@decided_once
def _launch_x(
    device: torch.device, rows: int, width: int, stride: int, blocks: Blocks, precision: str, layout: RankLayout
) -> tuple[Launch, int]:
    """Beside the launch: the number of slices."""
    column_programs = cdiv(width, blocks.columns)
    per_slice = slice_rows(rows, column_programs, blocks.inner)
    slices = cdiv(rows, per_slice)
    launch = Launch(
        weight_grad_kernel, (column_programs, slices), (rows, width, stride, per_slice),
        STACKED=layout.rank_sum + layout.gates, COLS=layout.columns, PRECISION=precision,
        BLOCK_T=blocks.inner, BLOCK_D=blocks.columns, **blocks.options,
    )  # fmt: skip
    return launch, slices


def sum_partials(
    partial_b: Tensor, partial_x: Tensor, partial_bias: Tensor | None, layout: RankLayout,
    db: Tensor, da: Tensor, drouter: Tensor | None, drouter_bias: Tensor | None,
) -> None:  # fmt: skip
    """Add the slices in order into dB (R, O), dA (R, K), d router_weight (G, K), d router_bias (G,): one launch."""
    launch = _launch_sums(
        db.device, partial_b.shape[0], partial_x.shape[0], 0 if partial_bias is None else partial_bias.shape[0],
        db.numel(), da.numel(), layout.gates, da.shape[1], drouter_bias is not None,
    )  # fmt: skip
    launch(partial_b, partial_x, partial_bias, db, da, drouter, drouter_bias)


@decided_once
def _launch_sums(
    device: torch.device, slices_b: int, slices_x: int, programs_bias: int, size_b: int, size_a: int, gates: int,
    width: int, with_bias: bool,
) -> Launch:  # fmt: skip
    depth, block = 8, 256
    size_x = size_a + gates * width
    return Launch(
        sum_partials_kernel,
        (cdiv(size_b, block) + cdiv(size_x, block) + int(with_bias),),
        (slices_b, slices_x, programs_bias, size_b, size_a, size_x),
        GATES=gates, GATE_COLS=power_of_two(max(gates, 1), 1), WITH_BIAS=with_bias,
        DEPTH=depth, BLOCK=block, enable_fp_fusion=True,
    )  # fmt: skip
