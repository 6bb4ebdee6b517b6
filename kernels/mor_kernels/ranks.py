"""The narrow side of a MoR linear, as device functions that the kernels share.

The rank vectors and the router logits of a row are computed together, as the columns of one narrow product::

    z = x [A; router_weight]^T            columns 0..R-1: h = x A^T,   columns R..R+G-1: router logits

COLS >= R + G is the power of two that the tile is padded to; padded columns read zeros.

Shapes: T rows, K in, O out, E experts, R sum of ranks, G router outputs (E, or E + 1 with the bypass last; 0
without a router). OFFSETS are the E + 1 boundaries of the experts' columns, SCALING the E factors alpha / rank.
"""

# mypy: allow-untyped-defs

from dataclasses import dataclass
from functools import cached_property, lru_cache

import triton
import triton.language as tl

# TRITON_INTERPRET must have been there before triton itself was imported, or its own functions are still compiled ones.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret) and not isinstance(tl.sum, triton.JITFunction)

# The interpreter's arithmetic on bf16 is wrong without a word; its loads, stores and casts are right.
UPCAST = tl.constexpr(INTERPRETED)


def power_of_two(n: int, minimum: int = 16) -> int:
    """Smallest power of two that holds n columns; tl.dot takes no fewer than 16 along its summed side."""
    return max(minimum, 1 << (n - 1).bit_length())


@dataclass(frozen=True, eq=False)  # compared and hashed as an object, which is fast: see `rank_layout`
class RankLayout:
    """Which column of the narrow product belongs to whom; everything here is a compile-time constant."""

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    bypass: bool

    @property
    def experts(self) -> int:
        return len(self.ranks)

    @cached_property
    def rank_sum(self) -> int:
        return sum(self.ranks)

    @cached_property
    def gates(self) -> int:
        """Router outputs. A single expert without a bypass has gate 1 and needs no router."""
        return 0 if self.experts == 1 and not self.bypass else self.experts + int(self.bypass)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return tuple(sum(self.ranks[:i]) for i in range(self.experts + 1))

    @cached_property
    def columns(self) -> int:
        """Padded width of [h | logits]."""
        return power_of_two(self.rank_sum + self.gates)

    @cached_property
    def rank_columns(self) -> int:
        """Padded width of h alone."""
        return power_of_two(self.rank_sum)

    @cached_property
    def constants(self) -> dict:
        """The keyword arguments that every kernel takes."""
        return {
            "OFFSETS": self.offsets,
            "SCALING": self.scaling,
            "R": self.rank_sum,
            "GATES": self.gates,
            "EXPERTS": self.experts,
        }


@lru_cache(maxsize=256)
def rank_layout(ranks: tuple[int, ...], scaling: tuple[float, ...], bypass: bool) -> RankLayout:
    """The same object for the same arguments."""
    return RankLayout(ranks, scaling, bypass)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_tile(ptr, stride, rows, columns, row_limit, column_limit):
    """ptr[rows, columns], zero outside the limits; `rows` int64, unit stride along the columns."""
    inside = (rows < row_limit)[:, None] & (columns < column_limit)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, stride, rows, columns, row_limit, column_limit, value):
    """ptr[rows, columns] = value within the limits, in ptr's dtype."""
    inside = (rows < row_limit)[:, None] & (columns < column_limit)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_stacked(first, second, rows, columns, width, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """[first; second][rows, columns] of two contiguous matrices of one width and dtype, zero outside.

    first (FIRST, width), second (SECOND, width); with SECOND == 0 `second` is never touched.
    """
    ptrs = first + rows[:, None] * width + columns[None, :]
    if SECOND > 0:
        ptrs = tl.where(rows[:, None] < FIRST, ptrs, second + (rows[:, None] - FIRST) * width + columns[None, :])
    inside = (rows < FIRST + SECOND)[:, None] & (columns < width)[None, :]
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def rank_product(
    x, a, router, rows, T, K, stride_x,
    R: tl.constexpr, GATES: tl.constexpr, COLS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z (BLOCK_T, COLS) = x [A; router]^T in fp32, in one reading of x."""
    columns = tl.arange(0, COLS)
    z = tl.zeros((BLOCK_T, COLS), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, stride_x, rows, inner, T, K)
        w_tile = load_stacked(a, router, columns, inner, K, R, GATES)
        z = dot(x_tile, tl.trans(w_tile.to(x_tile.dtype)), z, PRECISION)
    return z


@triton.jit
def gate_and_save(
    z, router_bias, h, gates, rows, T,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, R: tl.constexpr, GATES: tl.constexpr, EXPERTS: tl.constexpr,
    COLS: tl.constexpr, HAS_ROUTER_BIAS: tl.constexpr,
):  # fmt: skip
    """Softmax the logits, write h (T, R) and gates (T, GATES), and return h times gate times scaling, in fp32."""
    columns = tl.arange(0, COLS)
    store_tile(h, R, rows, columns, T, R, z)
    if GATES == 0:
        factor = tl.where(columns < R, SCALING[0], 0.0)[None, :]
    else:
        is_gate = (columns >= R) & (columns < R + GATES)
        logits = z
        if HAS_ROUTER_BIAS:
            logits += tl.load(router_bias + columns - R, mask=is_gate, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(is_gate[None, :], logits, float("-inf"))
        weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        g = weights / tl.sum(weights, axis=1)[:, None]
        tl.store(
            gates + rows[:, None] * GATES + (columns - R)[None, :],
            g,
            mask=(rows < T)[:, None] & is_gate[None, :],
        )
        factor = tl.zeros_like(z)
        for i in tl.static_range(EXPERTS):
            gate = tl.sum(tl.where((columns == R + i)[None, :], g, 0.0), axis=1)
            own = (columns >= OFFSETS[i]) & (columns < OFFSETS[i + 1])
            factor += tl.where(own[None, :], (gate * SCALING[i])[:, None], 0.0)
    return tl.where((columns < R)[None, :], z * factor, 0.0)


@triton.jit
def saved_factor(
    gates, rows, T,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, R: tl.constexpr, GATES: tl.constexpr, EXPERTS: tl.constexpr,
    COLS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gate times scaling of every rank column (BLOCK_T, COLS), from the saved gates; zero beyond the R-th column."""
    columns = tl.arange(0, COLS)
    factor = tl.zeros((BLOCK_T, COLS), dtype=tl.float32)
    if GATES == 0:
        factor += tl.where(columns < R, SCALING[0], 0.0)[None, :]
    else:
        for i in tl.static_range(EXPERTS):
            gate = tl.load(gates + rows * GATES + i, mask=rows < T, other=0.0)
            own = (columns >= OFFSETS[i]) & (columns < OFFSETS[i + 1])
            factor += tl.where(own[None, :], (gate * SCALING[i])[:, None], 0.0)
    return factor
