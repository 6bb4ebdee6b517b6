"""The Mixture-of-Ranks equation, written twice: plainly, and fast; and the choice between these and the fused kernels.

Shapes: T rows (all tokens), K in, O out, E experts, R sum of ranks, G router outputs (E, or E + 1 with the
bypass, which is the last). ``A`` (R, K) and ``B`` (R, O) hold the experts' rows one expert after the other.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "eager", "concat", "triton")

# Ranks, scaling, and the dtype to which the frozen weight is cast (None: it is used as it is).
_Settings = tuple[tuple[int, ...], tuple[float, ...], torch.dtype | None]


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
    bypass: bool = True,
    expert_input: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""A frozen linear map plus experts of several ranks, weighted per token.

    .. math::
        g = \mathrm{softmax}(W_r x + c), \qquad y = W x + b + \sum_i g_i \, s_i \, B_i^T A_i x

    The gates are computed in fp32 or wider. With a bypass, ``g`` has one more entry than there are experts,
    and the experts' weights sum to less than one. The result has the dtype of ``F.linear(x, weight, bias)``,
    under autocast too; the adapter's parameters may be wider than ``x``.

    Args:
        x: (..., K), any leading shape, including none and zero rows.
        weight: W, (O, K).
        bias: b, (O,), or None.
        A: (R, K).
        B: (R, O): transposed, so that an expert's rows are contiguous along O.
        router_weight: W_r, (G, K); None only for a single expert without bypass, whose gate is 1.
        router_bias: c, (G,), or None.
        ranks: Rank of each expert; they sum to R.
        scaling: s, one factor per expert.
        bypass: Whether the last router output belongs to no expert.
        expert_input: (..., K), what the experts read in place of ``x`` (``x`` after dropout); the router
            always reads ``x``.
        backend: "eager" (a loop over the experts, the definition), "concat" (all experts and the router in
            one product, gates on the rank side), "triton" (fused kernels, see kernels/README.md) or "auto":
            "triton" on a CUDA device where it can serve, else "concat". Only "eager" has second derivatives
            and works under torch.func and forward-mode AD, where "auto" takes it.

    Returns:
        y, (..., O).

    Raises:
        ValueError: shapes, ranks or backend do not fit together, or "triton" is asked for where it cannot serve.

    Source: arXiv 2603.17514, section 3.4, Eq. 4.

    >>> x, W = torch.ones(1, 2), torch.zeros(1, 2)
    >>> A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]])
    >>> router = torch.zeros(2, 2)  # one expert and the bypass, half each
    >>> mor_linear(x, W, None, A, B, router, None, ranks=[1], scaling=[2.0])
    tensor([[1.]])
    """
    device = x.device.type
    autocast = _in_autocast(device)
    dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
    backend = choose_backend(
        backend,
        x.device,
        dtype,
        columns=sum(ranks) + (0 if router_weight is None else len(ranks) + bypass),
        trains_base=weight.requires_grad or (bias is not None and bias.requires_grad),
        has_expert_input=expert_input is not None,
        shape=(math.prod(x.shape[:-1]), *weight.shape),  # Size.numel would make free sizes constants of a graph
    )
    if backend == "triton":  # which checks the shapes itself, and casts inside the kernels, where that costs nothing
        parameters = (A, B, router_weight, router_bias)
        return _kernels().mor_linear(x, weight, bias, *parameters, ranks=ranks, scaling=scaling, bypass=bypass)

    _check_shapes(x, weight.shape, A, B, router_weight, ranks, scaling, bypass, expert_input)
    A, B = A.to(dtype), B.to(dtype)
    router_weight = None if router_weight is None else router_weight.to(dtype)
    if autocast:
        # Elsewhere a dtype of x that does not fit the weight is the caller's error, as it is for F.linear.
        x = x.to(dtype)
        expert_input = None if expert_input is None else expert_input.to(dtype)
    settings = (tuple(ranks), tuple(scaling), dtype if autocast else None)
    form = _eager if backend == "eager" else _concat
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return form(x, expert_input, weight, bias, A, B, router_weight, router_bias, settings)


def mor_branch(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    *,
    ranks: Sequence[int],
    scaling: Sequence[float],
    bypass: bool = True,
    expert_input: Tensor | None = None,
) -> Tensor:
    r"""The experts' part of :func:`mor_linear` alone, :math:`\sum_i g_i \, s_i \, B_i^T A_i x`, (..., O).

    For a base that has to be called because its weight is no plain matrix (quantised ones), and for a second
    adapter on the same base. Where W is at hand, :func:`mor_linear` is faster.

    >>> A, B, router = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]]), torch.zeros(2, 2)
    >>> mor_branch(torch.ones(1, 2), A, B, router, None, ranks=[1], scaling=[2.0])
    tensor([[1.]])
    """
    _check_shapes(x, (B.shape[-1], A.shape[-1]), A, B, router_weight, ranks, scaling, bypass, expert_input)
    device = x.device.type
    autocast = _in_autocast(device)
    dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
    x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    router_weight = None if router_weight is None else router_weight.to(dtype)
    expert_input = x if expert_input is None else expert_input.to(dtype)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return _experts(x, expert_input, A, B, router_weight, router_bias, tuple(ranks), tuple(scaling))


def choose_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    columns: int,
    trains_base: bool = False,
    has_expert_input: bool = False,
    shape: tuple[int, int, int] | None = None,
) -> str:
    """The backend that a call uses: what "auto" stands for, or the one named, if it can serve.

    Args:
        device, dtype: Of x; under autocast, its dtype.
        columns: Sum of ranks plus router outputs.
        trains_base: W or b wants a gradient.
        has_expert_input: The experts read another input than the router.
        shape: (T, O, K); "auto" then also heeds what was measured on this card.

    Raises:
        ValueError: the backend is unknown, or cannot serve; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "eager" and _transformed():
        if backend == "auto":
            return "eager"
        raise ValueError(f"backend {backend!r} cannot serve torch.func or forward-mode AD; 'auto' takes 'eager' there")
    if backend == "auto" and device.type != "cuda":
        return "concat"
    if backend in ("eager", "concat"):
        return backend
    lacks = _triton_lacks(device, dtype, columns, trains_base, has_expert_input)
    if lacks and backend == "triton":
        raise ValueError(f"backend 'triton' needs {lacks}; 'auto' takes 'concat' there")
    if lacks:
        return "concat"
    if backend == "auto" and shape is not None:
        rows, out_features, in_features = shape
        if _kernels().prefers_library(device, dtype, in_features, out_features, rows):
            return "concat"
    return "triton"


def _transformed() -> bool:
    """Whether derivatives other than those of ``backward`` may be asked for: what is written by hand has no others."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _triton_lacks(
    device: torch.device, dtype: torch.dtype, columns: int, trains_base: bool, has_expert_input: bool
) -> str | None:
    """What keeps the fused kernels from serving a call; None if nothing does."""
    if not _kernels_run_on(device):
        return f"triton and a CUDA device of compute capability 8.0 or newer, got {device}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"fp32, fp16 or bf16, got {dtype}"
    if columns > _kernels().MAX_COLUMNS:
        return f"sum of ranks plus router outputs of at most {_kernels().MAX_COLUMNS}, got {columns}"
    if trains_base:
        return "a frozen weight and bias, got one that requires a gradient"
    if has_expert_input:
        return "experts that read x itself, got expert_input (dropout)"
    return None


# A constant for torch.compile, which need not look into Triton.
@torch.compiler.assume_constant_result
def _kernels_run_on(device: torch.device) -> bool:
    return _cached_availability(device)


@cache
def _cached_availability(device: torch.device) -> bool:
    return _kernels().is_available(device)


def _kernels() -> Any:
    # Imported on first use: Triton takes time to load, and nothing on a CPU needs it.
    import mor_kernels

    return mor_kernels


def mor_gates(x: Tensor, router_weight: Tensor, router_bias: Tensor | None) -> Tensor:
    """softmax(W_r x + c), (..., G), in fp32 or wider."""
    return _softmax(F.linear(x, router_weight), router_bias)


def _in_autocast(device: str) -> bool:
    # The meta device has no autocast, and must not be asked.
    return device != "meta" and torch.is_autocast_enabled(device)


def _eager(
    x: Tensor,
    expert_input: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    settings: _Settings,
) -> Tensor:
    ranks, scaling, base_dtype = settings
    y = F.linear(x, *_cast_base(weight, bias, base_dtype))
    gates = None if router_weight is None else mor_gates(x, router_weight, router_bias).to(x.dtype)
    u = x if expert_input is None else expert_input
    for i, (A_i, B_i) in enumerate(zip(A.split(ranks), B.split(ranks), strict=True)):
        gate = 1.0 if gates is None else gates[..., i : i + 1]
        y = y + gate * scaling[i] * (u @ A_i.T @ B_i)
    return y


def _concat(
    x: Tensor,
    expert_input: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    settings: _Settings,
) -> Tensor:
    if expert_input is None:
        y = _Concatenated.apply(x, weight, bias, A, B, router_weight, router_bias, settings)
        return y.view(*x.shape[:-1], len(weight))
    ranks, scaling, base_dtype = settings
    y = F.linear(x, *_cast_base(weight, bias, base_dtype))
    return y + _experts(x, expert_input, A, B, router_weight, router_bias, ranks, scaling)


def _experts(
    x: Tensor,
    expert_input: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    ranks: tuple[int, ...],
    scaling: tuple[float, ...],
) -> Tensor:
    gates = None if router_weight is None else mor_gates(x, router_weight, router_bias)
    return _weigh(expert_input @ A.T, gates, ranks, scaling, dim=-1) @ B


class _Concatenated(torch.autograd.Function):
    """All experts in one product: y = W x + b + B^T (gate * A x), gate_j = g_i s_i for each row j of expert i.

    Written by hand because autograd would keep the steps between logits and gate, and hold two gradients of x's
    size before adding them; this keeps x, h = A x and g, and accumulates in place. What belongs to ranks and gates
    lies token by token in each row, (R, T): BLAS takes less time for ``A @ x.T`` than for ``x @ A.T``, and half as
    long for ``B @ dy.T`` as for ``dy @ B.T``, and an expert's rows are one block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., K)
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        router_weight: Tensor | None,
        router_bias: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        ranks, scaling, base_dtype = settings
        rows = x.reshape(-1, x.shape[-1])  # (T, K)
        gates = None
        if router_weight is None:
            h = A @ rows.T  # (R, T)
        else:
            h, logits = (torch.cat([A, router_weight]) @ rows.T).split([len(A), len(router_weight)])
            h = h.clone()  # lets go of the logits beside it, which would be kept for backward
            gates = _softmax(logits, None if router_bias is None else router_bias[:, None], dim=0)  # (G, T)
        gated = _weigh(h, gates, ranks, scaling, dim=0).T
        base = _cast_base(weight, bias, base_dtype)
        if x.is_contiguous() and not torch.compiler.is_compiling():
            # In place saves a copy of y; but torch 2.11 compiles that to gradients of zero, without a word.
            y = F.linear(rows, *base).addmm_(gated, B)  # (T, O)
        else:
            # Of x as it came: with other strides BLAS may round differently, and the frozen model's bits would be lost.
            y = torch.addmm(F.linear(x, *base).reshape(-1, len(weight)), gated, B)
        ctx.save_for_backward(x, weight, A, B, router_weight, h, gates)
        ctx.settings = settings
        ctx.bias_dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, router_bias)]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("backend 'concat' has no second derivatives (create_graph=True); set backend='eager'")
        if _in_autocast(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _Concatenated.backward(ctx, dy)
        x, weight, A, B, router_weight, h, gates = ctx.saved_tensors
        ranks, scaling, base_dtype = ctx.settings
        bias_dtype, router_bias_dtype = ctx.bias_dtypes
        rows = x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_router, needs_router_bias, _ = ctx.needs_input_grad

        d_gated = B @ dy.T  # (R, T)
        d_side, side = _weigh(d_gated, gates, ranks, scaling, dim=0), A
        d_logits = None
        if gates is not None:
            by_expert = (d_gated.to(gates.dtype) * h).split(ranks)
            of_experts = [scale * product.sum(0) for product, scale in zip(by_expert, scaling, strict=True)]
            of_bypass = [torch.zeros_like(of_experts[0])] * (len(gates) - len(ranks))
            d_gates = torch.stack(of_experts + of_bypass)
            d_logits = gates * (d_gates - (d_gates * gates).sum(0))  # (G, T)
            d_side = torch.cat([d_side, d_logits.to(h.dtype)])
            side = torch.cat([A, router_weight])

        dx = dA = d_router = d_router_bias = None
        if needs_x:
            dx = (dy @ _cast_base(weight, None, base_dtype)[0]).addmm_(d_side.T, side).view(x.shape)
        if needs_A or needs_router:
            dA, d_router = (d_side @ rows).tensor_split([len(A)])
        if needs_router_bias:
            assert d_logits is not None
            d_router_bias = d_logits.sum(1).to(router_bias_dtype)
        dB = _weigh(h, gates, ranks, scaling, dim=0) @ dy if needs_B else None
        d_weight = (dy.T @ rows).to(weight.dtype) if needs_weight else None
        d_bias = dy.sum(0).to(bias_dtype) if needs_bias else None
        return dx, d_weight, d_bias, dA, dB, d_router if needs_router else None, d_router_bias, None


def _softmax(logits: Tensor, router_bias: Tensor | None, dim: int = -1) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    return (logits if router_bias is None else logits + router_bias.to(wide)).softmax(dim)


def _weigh(rows: Tensor, gates: Tensor | None, ranks: tuple[int, ...], scaling: tuple[float, ...], dim: int) -> Tensor:
    """Each expert's part of ``rows`` along ``dim`` times g_i s_i; just s where a single expert has no router."""
    if gates is None:
        return rows * scaling[0]
    gates_of_experts = gates.split(1, dim)[: len(ranks)]  # the bypass, if any, is the last
    experts = zip(rows.split(ranks, dim), gates_of_experts, scaling, strict=True)
    return torch.cat([part * (gate * scale) for part, gate, scale in experts], dim).to(rows.dtype)


def _cast_base(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    if dtype is None:
        return weight, bias
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_shapes(
    x: Tensor,
    weight_shape: Sequence[int],
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    ranks: Sequence[int],
    scaling: Sequence[float],
    bypass: bool,
    expert_input: Tensor | None,
) -> None:
    out_features, in_features = weight_shape
    total, gates = sum(ranks), len(ranks) + bypass
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must end in {in_features} features to fit weight, got shape {tuple(x.shape)}")
    if len(scaling) != len(ranks):
        raise ValueError(f"scaling must have one factor per rank, got {len(scaling)} for {len(ranks)} ranks")
    if A.shape != (total, in_features):
        raise ValueError(f"A must be ({total}, {in_features}) for ranks {tuple(ranks)}, got {tuple(A.shape)}")
    if B.shape != (total, out_features):
        raise ValueError(f"B must be ({total}, {out_features}) for ranks {tuple(ranks)}, got {tuple(B.shape)}")
    if router_weight is None and gates > 1:
        raise ValueError(f"router_weight is needed for {len(ranks)} experts with bypass={bypass}, got None")
    if router_weight is not None and gates == 1:
        raise ValueError("router_weight must be None for a single expert without bypass, whose gate is 1")
    if router_weight is not None and router_weight.shape != (gates, in_features):
        raise ValueError(
            f"router_weight must be ({gates}, {in_features}) for {len(ranks)} experts with bypass={bypass},"
            f" got {tuple(router_weight.shape)}"
        )
    if expert_input is not None and expert_input.shape != x.shape:
        raise ValueError(f"expert_input must have x's shape {tuple(x.shape)}, got {tuple(expert_input.shape)}")
