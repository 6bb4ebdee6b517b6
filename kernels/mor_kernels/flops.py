"""What the two operators count for in torch.utils.flop_counter.FlopCounterMode: their products of matrices.

A multiplication and an addition each, as for torch's own operators. Importing this module registers them.
"""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import mor_kernels.linear  # noqa: F401 (defines the operators)

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.mor_kernels.linear_forward)
def _forward(
    x: Shape, weight: Shape, bias: Shape | None, a: Shape, b: Shape, router: Shape | None, *_: Any, **__: Any
) -> int:
    return 2 * prod(x[:-1]) * (prod(weight) + _side(a, router) + prod(b))


@register_flop_formula(torch.ops.mor_kernels.linear_backward)
def _backward(
    dy: Shape, x: Shape, weight: Shape, a: Shape, b: Shape, router: Shape | None, *rest: Any, **__: Any
) -> int:
    *_, with_dx, with_weights = rest
    of_dx = (prod(weight) + _side(a, router)) * with_dx
    of_weights = (_side(a, router) + prod(b)) * with_weights
    return 2 * prod(dy[:-1]) * (prod(b) + of_dx + of_weights)


def _side(a: Shape, router: Shape | None) -> int:
    """Elements of [A; router_weight]."""
    return prod(a) + (prod(router) if router is not None else 0)
