"""One MoR linear as the kernel tests use it: its tensors, the definition in a loop, and how wrong a result is."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMES = ("x", "A", "B", "router_weight", "router_bias")
FORMS = ("branch", "tail")
RANK_SETS = [((2, 4, 8), True), ((2, 4, 8), False), ((4,), False), ((4,), True), ((3, 5), True), ((16, 16, 24), True)]
# Relative Frobenius error: rounding of the operands and of the result, with room for small sizes.
# The interpreter casts fp32 to bf16 by cutting bits off instead of rounding, which doubles that dtype's error there.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 1.5e-3,
    torch.bfloat16: 1.2e-2 if torch.cuda.is_available() else 3e-2,
}


@dataclass
class Problem:
    """One MoR linear with its incoming gradient. Tensors are leaves in `dtype`; `scaling` differs by expert."""

    rows: int
    width: int
    out: int
    ranks: tuple[int, ...] = (2, 4, 8)
    bypass: bool = True
    bias: bool = True
    router_bias: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tensors: dict[str, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        gates = 0 if len(self.ranks) == 1 and not self.bypass else len(self.ranks) + self.bypass
        generator = torch.Generator().manual_seed(self.rows + 7 * self.width + 31 * self.out)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(self.device, self.dtype)

        rank_sum, root = sum(self.ranks), self.width**-0.5
        self.tensors = {
            "x": draw(self.rows, self.width),
            "weight": draw(self.out, self.width, scale=root),
            "bias": draw(self.out) if self.bias else None,
            "A": draw(rank_sum, self.width, scale=root),
            "B": draw(rank_sum, self.out, scale=rank_sum**-0.5),
            "router_weight": draw(gates, self.width, scale=2 * root) if gates else None,
            "router_bias": draw(gates) if gates and self.router_bias else None,
            "dy": draw(self.rows, self.out),
        }

    @property
    def scaling(self) -> tuple[float, ...]:
        return tuple(2.0 / (i + 1) for i in range(len(self.ranks)))


def loop(x, weight, bias, A, B, router_weight, router_bias, *, ranks, scaling, bypass):
    """The definition, one expert after the other."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if router_weight is None:
        gates = x.new_ones(*x.shape[:-1], 1)
    else:
        logits = x @ router_weight.T
        gates = torch.softmax(logits if router_bias is None else logits + router_bias, dim=-1)
    start = 0
    for i, rank in enumerate(ranks):
        own = slice(start, start + rank)
        y = y + gates[..., i : i + 1] * scaling[i] * (x @ A[own].T @ B[own])
        start += rank
    return y


def leaves(problem: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    def leaf(name: str, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t.detach().clone() if dtype is None else t.detach().to(dtype)
        return t.requires_grad_(name in NAMES)

    return {name: leaf(name, t) for name, t in problem.tensors.items()}


def run(function, problem: Problem, tensors: dict[str, Tensor | None], **options) -> dict[str, Tensor]:
    """The output and the gradient of everything that asks for one."""
    arguments = [tensors[name] for name in ("x", "weight", "bias", *NAMES[1:])]
    y = function(*arguments, ranks=problem.ranks, scaling=problem.scaling, bypass=problem.bypass, **options)
    y.backward(tensors["dy"])
    found = {f"d{name}": tensors[name].grad for name in NAMES if tensors[name] is not None}
    return {"y": y.detach(), **found}


def error(got: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; NaN is an infinite one."""
    assert got.shape == expected.shape
    value = (got.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(value.nan_to_num(nan=torch.inf))


def check(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    errors = {name: error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors
