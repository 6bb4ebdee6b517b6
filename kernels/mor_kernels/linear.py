"""The MoR linear as two torch operators, forward and backward, and `mor_linear`, the function to call.

    y = x W^T + bias + sum_i gate_i scaling_i (x A_i^T) B_i,    gates = softmax(x router_weight^T + router_bias)

In the branch form a kernel writes the adapter's part (and the bias) into y, and the library's GEMM adds to it; in
the tail form one GEMM of our own does both. Backward likewise. W and bias are frozen. Kept for backward: x, h, gates.

Shapes: x (..., K), W (O, K), bias (O,), A (R, K), B (R, O), router_weight (G, K), router_bias (G,), h (..., R) in x's
dtype, gates (..., G) in fp32. B is stored transposed, contiguous along O; the bypass is the last gate.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, library, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mor_kernels.branch import branch
from mor_kernels.dy_side import dy_side
from mor_kernels.matmul_tail import matmul_tail
from mor_kernels.ranks import INTERPRETED, RankLayout, rank_layout
from mor_kernels.shrink import shrink
from mor_kernels.tables import FUSED_FORMS, choose_forms
from mor_kernels.weight_grad import sum_partials, x_partials

MAX_COLUMNS = 64  # sum of ranks + router outputs
FORMS = ("auto", *FUSED_FORMS)
PLAIN = {Tensor, nn.Parameter, type(None)}
CONTIGUOUS = torch.contiguous_format
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _rows(t: Tensor) -> Tensor:
    """As a matrix (T, width) with unit stride along the width; a copy only where the strides ask for one."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    """The small matrices in the one layout that the kernels read; they nearly always have it already."""
    return [None if t is None else t.contiguous() for t in tensors]


def _on(device: torch.device) -> AbstractContextManager:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    ranks: Sequence[int],
    scaling: Sequence[float],
    bypass: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., O), h (..., R), gates (..., G)."""
    layout = rank_layout(tuple(ranks), tuple(scaling), bypass)
    y, h, gates = _outputs(x, weight, layout)
    if y.numel() == 0:
        return y, h, gates
    x = _rows(x)
    a, b, bias, router_weight, router_bias = _contiguous(a, b, bias, router_weight, router_bias)
    if form == "auto":
        form = choose_forms(x, weight.shape[0]).forward
    with _on(x.device):
        if form == "branch":
            branch(x, a, router_weight, router_bias, b, bias, layout, y, h, gates)
            y.view(-1, y.shape[-1]).addmm_(x, weight.t())
        else:
            gated = shrink(x, a, router_weight, router_bias, layout, h, gates)
            matmul_tail(x, weight.t(), gated, b, None, bias, out=y)
    return y, h, gates


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    h: Tensor,
    gates: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
    bypass: bool,
    form: str,
    with_dx: bool,
    with_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, d router_weight, d router_bias; an empty tensor stands for each one not asked for."""
    _refuse_forward_mode()
    layout = rank_layout(tuple(ranks), tuple(scaling), bypass)
    dx, da, db, drouter, drouter_bias = _gradients(x, a, b, router_weight, router_bias, with_dx, with_weights)
    if x.numel() == 0:
        return dx, da.zero_(), db.zero_(), drouter.zero_(), drouter_bias.zero_()
    rows, dy = _rows(x), _rows(dy)
    a, b, router_weight, h, gates = _contiguous(a, b, router_weight, h, gates)
    if form == "auto":
        form = choose_forms(rows, weight.shape[0]).backward
    with _on(x.device):
        branch_dx = dx if with_dx and form == "branch" else None
        dz, partial_b, partial_bias = dy_side(
            dy, b, h, gates, a, router_weight, layout, dx=branch_dx, with_weights=with_weights
        )
        if branch_dx is not None:
            dx.view(rows.shape).addmm_(dy, weight)
        elif with_dx:
            matmul_tail(dy, weight, dz, a, router_weight, None, out=dx)
        if partial_b is not None:
            partial_x = x_partials(rows, dz, layout)
            drouter_bias_wanted = None if router_bias is None else drouter_bias
            sum_partials(partial_b, partial_x, partial_bias, layout, db, da, drouter, drouter_bias_wanted)
    return dx, da, db, drouter, drouter_bias


def _outputs(x: Tensor, weight: Tensor, layout: RankLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y, h and gates."""
    lead = x.shape[:-1]
    return (
        x.new_empty(*lead, weight.shape[0]),
        x.new_empty(*lead, layout.rank_sum),
        x.new_empty(*lead, layout.gates, dtype=torch.float32),
    )


def _gradients(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    with_dx: bool,
    with_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for dx, dA, dB, d router_weight and d router_bias; empty tensors for those nobody asked for."""

    def like(t: Tensor | None, wanted: bool) -> Tensor:
        return torch.empty_like(t, memory_format=CONTIGUOUS) if wanted and t is not None else x.new_empty(0)

    da, db, drouter, drouter_bias = [like(t, with_weights) for t in (a, b, router_weight, router_bias)]
    return like(x, with_dx), da, db, drouter, drouter_bias


linear_forward = library.custom_op("mor_kernels::linear_forward", _forward, mutates_args=())
linear_backward = library.custom_op("mor_kernels::linear_backward", _backward, mutates_args=())


@linear_forward.register_fake
def _(x, weight, bias, a, b, router_weight, router_bias, ranks, scaling, bypass, form):  # type: ignore[no-untyped-def]
    return _outputs(x, weight, rank_layout(tuple(ranks), tuple(scaling), bypass))


@linear_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, x, weight, a, b, router_weight, router_bias, h, gates, ranks, scaling, bypass, form, with_dx, with_weights
):  # fmt: skip
    return _gradients(x, a, b, router_weight, router_bias, with_dx, with_weights)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, a, b, router_weight, router_bias, *ctx.settings = inputs
    _, h, gates = output
    ctx.mark_non_differentiable(h, gates)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, a, b, router_weight, router_bias, h, gates)


def _gradients_of(ctx: Any, dy: Tensor | None, *_of_saved: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    with_dx, _, _, *wanted = ctx.needs_input_grad[:7]
    tensors = (dy, *ctx.saved_tensors)
    # With create_graph autograd looks on, too: the operator refuses second derivatives, `_backward` would give a part.
    by_operator = torch.is_grad_enabled() or _watched(*tensors)
    backward: Callable[..., tuple[Tensor, ...]] = linear_backward if by_operator else _backward
    dx, *gradients = backward(*tensors, *ctx.settings, with_dx, any(wanted))
    da, db, drouter, drouter_bias = [g if wants else None for g, wants in zip(gradients, wanted, strict=True)]
    return dx if with_dx else None, None, None, da, db, drouter, drouter_bias, None, None, None, None


linear_forward.register_autograd(_gradients_of, setup_context=_setup_context)


class _Linear(torch.autograd.Function):
    """What `register_autograd` makes of the two operators, without them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, h, gates = _forward(*inputs)
        x, weight, _, a, b, router_weight, router_bias, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, a, b, router_weight, router_bias, h, gates)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients_of(ctx, dy)


def _watched(first: Tensor, *rest: Tensor | None) -> bool:
    """Whether somebody has to see operators: a compiler, a tracer, a dispatch mode (fake tensors, selective
    checkpoints), a function transform, a kind of tensor of its own, or in `first` a batch of gradients
    (is_grads_batched)."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        or _len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._are_functorch_transforms_active()
        or not PLAIN.issuperset(map(type, (first, *rest)))
        or is_legacy_batchedtensor(first)
    )


def mor_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    *,
    ranks: Sequence[int],
    scaling: Sequence[float],
    bypass: bool,
    form: str = "auto",
) -> Tensor:
    """y = x W^T + bias + sum_i gate_i scaling_i (x A_i^T) B_i, fused, where `mor_kernels.is_available()`.

    Args:
        x: (..., K), any strides; fp32, fp16 or bf16. Under autocast it is cast as `F.linear` would.
        weight: (O, K), frozen, in x's dtype. bias: (O,) or None, frozen.
        A: (R, K), the experts' down projections stacked.
        B: (R, O), their up projections, transposed and stacked.
        router_weight: (G, K), one output per expert and, with a bypass, a last one for it. A single expert without
            a bypass has no router: None. router_bias: (G,) or None.
        ranks, scaling: one entry per expert, scaling = alpha / rank. Constants of the compiled kernels.
        bypass: whether a last gate, without an expert, takes its share of the probability.
        form: "branch" or "tail" (see the head of this file); "auto" takes the measured winner, else "branch".

    Returns:
        (..., O), contiguous, in x's dtype. A, B and the router may be in any of the three dtypes; their gradients
        come back in it.
    """
    ranks, scaling = tuple(map(int, ranks)), tuple(map(float, scaling))
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if router_weight is not None and router_weight.dtype != A.dtype:
        router_weight = router_weight.to(A.dtype)
    _check(x, weight, bias, A, B, router_weight, router_bias, ranks, scaling, bypass, form)
    tensors = (x, weight, bias, A, B, router_weight, router_bias)
    if _watched(*tensors):
        return linear_forward(*tensors, ranks, scaling, bypass, form)[0]
    return _Linear.apply(*tensors, ranks, scaling, bypass, form)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    ranks: tuple[int, ...],
    scaling: tuple[float, ...],
    bypass: bool,
    form: str,
) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if not ranks or min(ranks) < 1 or len(scaling) != len(ranks):
        raise ValueError(f"ranks must be positive, with one scaling each; got ranks={ranks}, scaling={scaling}")
    rank_sum = sum(ranks)
    gates = 0 if len(ranks) == 1 and not bypass else len(ranks) + int(bypass)
    if rank_sum + gates > MAX_COLUMNS:
        raise ValueError(f"sum of ranks + router outputs must be <= {MAX_COLUMNS}, got {rank_sum} + {gates}")
    dtype, device, (out, width) = x.dtype, x.device, weight.shape
    if dtype not in DTYPES or weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        dtypes = [t.dtype for t in (x, weight, bias) if t is not None]
        raise ValueError(f"x, weight and bias must share one dtype of fp32, fp16 and bf16, got {dtypes}")
    if (router_weight is None) != (gates == 0):
        need = f"of shape ({gates}, {width})" if gates else "None: one expert without a bypass has no router"
        raise ValueError(f"router_weight must be {need}; got {router_weight if gates else 'a tensor'}")
    expected = (
        ("x", x, (*x.shape[:-1], width)),
        ("weight", weight, (out, width)),
        ("bias", bias, (out,)),
        ("A", a, (rank_sum, width)),
        ("B", b, (rank_sum, out)),
        ("router_weight", router_weight, (gates, width)),
        ("router_bias", router_bias, (gates,)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            sizes = f"weight is {(out, width)}, ranks are {ranks}, bypass={bypass}"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}; {sizes}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be fp32, fp16 or bf16, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as x is, got {tensor.device}")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("weight and bias get no gradient here; freeze them with requires_grad_(False)")
    _refuse_forward_mode()
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"x must be on a CUDA device, got {x.device}; TRITON_INTERPRET=1 runs on the CPU")


def _refuse_forward_mode() -> None:
    """Raise ValueError where torch would take an operator's tangent for zero."""
    if forward_ad._current_level >= 0:
        raise ValueError("forward-mode derivatives (torch.func.jvp, jacfwd, hessian) do not exist here")
