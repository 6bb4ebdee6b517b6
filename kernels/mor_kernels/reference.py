"""The operator's formulas in float64, part by part: what a kernel's results are held against before it is timed.

Slow, plain and without autograd; `linear.py` and README.md say what each name is. Shapes as there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mor_kernels.ranks import RankLayout

# Relative Frobenius error that rounding of operands and results explains, in sums of ordinary numbers.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Problem(NamedTuple):
    """One MoR linear with its incoming gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    router_weight: Tensor
    router_bias: Tensor
    dy: Tensor
    layout: RankLayout


def draw(rows: int, K: int, O: int, layout: RankLayout, dtype: torch.dtype, device: str) -> Problem:
    """Random numbers of ordinary size: nothing is zero, so nothing that is not read or not written can hide."""
    generator = torch.Generator(device).manual_seed(rows + 7 * K + 31 * O)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    return Problem(
        x=normal(rows, K),
        weight=normal(O, K, scale=K**-0.5),
        bias=normal(O, scale=0.1),
        a=normal(layout.rank_sum, K, scale=K**-0.5),
        b=normal(layout.rank_sum, O, scale=0.3 * layout.rank_sum**-0.5),
        router_weight=normal(layout.gates, K, scale=K**-0.5),
        router_bias=normal(layout.gates, scale=0.5),
        dy=normal(rows, O),
        layout=layout,
    )


def exact(problem: Problem) -> dict[str, Tensor]:
    """Every result, final or between the kernels, by name."""
    *tensors, layout = problem
    x, weight, bias, a, b, router_weight, router_bias, dy = (t.double() for t in tensors)
    h = x @ a.T
    gates = (x @ router_weight.T + router_bias).softmax(-1)
    factor = torch.cat(
        [
            (gates[:, i : i + 1] * scale).expand(-1, rank)
            for i, (rank, scale) in enumerate(zip(layout.ranks, layout.scaling, strict=True))
        ],
        dim=1,
    )
    gated = h * factor
    y0 = gated @ b + bias

    d = dy @ b.T
    dgates = torch.zeros_like(gates)
    for i, (product, scale) in enumerate(zip((d * h).split(layout.ranks, 1), layout.scaling, strict=True)):
        dgates[:, i] = scale * product.sum(1)
    dlogits = gates * (dgates - (gates * dgates).sum(1, keepdim=True))
    dz = torch.cat([d * factor, dlogits], 1)
    dx0 = dz @ torch.cat([a, router_weight])
    da, drouter_weight = (dz.T @ x).split([layout.rank_sum, layout.gates])
    return {
        "h": h, "gates": gates, "gated": gated, "y0": y0, "y": y0 + x @ weight.T,
        "dz": dz, "dx0": dx0, "dx": dx0 + dy @ weight,
        "da": da, "db": gated.T @ dy, "drouter_weight": drouter_weight, "drouter_bias": dlogits.sum(0),
    }  # fmt: skip


def error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, Frobenius; NaN is an infinite one.

    >>> error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) < 0.2
    True
    """
    if got.shape != expected.shape:
        return float("inf")
    off = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(off.nan_to_num(nan=torch.inf))


def red(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str | None:
    """What is wrong with these results, in one sentence; None where nothing is."""
    for name, tensor in got.items():
        off = error(tensor, expected[name])
        if not off <= TOLERANCE[dtype]:
            return f"{name} is off by {off:.1e} relative to float64"
    return None
