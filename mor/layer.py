"""MoRLinear: a linear layer with its Mixture-of-Ranks adapter, in place of nn.Linear."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from mor.config import MoRConfig
from mor.functional import BACKENDS, choose_backend, mor_branch, mor_gates, mor_linear
from mor.wrappers import original

PLAIN = (Tensor, nn.Parameter)
TRACED = (FakeTensor, FunctionalTensor)  # what stands for a plain one while a model is exported or looked at


class MoRLinear(nn.Module):
    """``base`` plus experts of several ranks, weighted per token by a router.

    The layer starts out as ``base`` exactly, because B is zero. ``base`` itself is kept (the same object) and
    frozen. Adapter parameters are created beside it, see :func:`new_adapter`. A base with a forward of its own, or a
    weight that is no plain matrix of floats (quantised ones: bitsandbytes, torchao), is called, and the experts' part
    added to what it gives. Who quantises after injecting leaves the router alone: it is a linear layer, too.

    Attributes:
        base: The original layer.
        mor_A: (R, K), the experts' inner rows one expert after the other, R the sum of ranks.
        mor_B: (R, O), the experts' outer rows, stored transposed.
        mor_router: nn.Linear(K, G) giving the gates' logits, the bypass last; None for a single expert
            without bypass.
        backend: How the sum is computed, see :func:`mor.mor_linear`; may be set at any time.
        enabled: False makes the layer its base; see :func:`mor.disabled`.

    Raises:
        TypeError: ``base`` is not an nn.Linear.
        ValueError: ``base`` has forward hooks (legacy weight_norm and others), which would no longer run.

    Source: arXiv 2603.17514, section 3.4.

    >>> layer = MoRLinear(nn.Linear(4, 6), MoRConfig(ranks=(1, 2)))
    >>> layer(torch.zeros(5, 4)).shape, sum(p.numel() for p in layer.parameters() if p.requires_grad)
    (torch.Size([5, 6]), 45)
    """

    def __init__(self, base: nn.Linear, config: MoRConfig | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be an nn.Linear, got {type(base).__name__}")
        if has_hooks(base):
            raise ValueError("base must have no forward hooks and no forward of its own, which would no longer run")
        self.config = config = config or MoRConfig()
        self.base = base.requires_grad_(False)
        self.backend = backend
        self.enabled = True
        self._calls_base = not is_plain(base)

        weight = stored_weight(base)
        self.mor_A, self.mor_B, self.mor_router = new_adapter(
            config, base.in_features, base.out_features, dtype=weight.dtype, device=weight.device
        )

    def reset_parameters(self) -> None:
        """Draw A and the router anew and set B to zero: the layer equals its base again."""
        reset_adapter(self.mor_A, self.mor_B, self.mor_router)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., O), see :func:`mor.mor_linear`; the argument is called as nn.Linear's."""
        base = self.base  # looked up once: nn.Module's attributes are slow
        if not self.enabled:
            return base(input)
        experts, settings = call_arguments(
            input, self.mor_A, self.mor_B, self.mor_router, self.config, training=self.training
        )
        # Read once, because that may change buffers; looked at each time, because it may have been quantised meanwhile.
        weight = None if self._calls_base else base.weight
        if weight is None or not is_matrix(weight):
            y = base(input)
            return y + mor_branch(input, *experts, **settings).to(y.dtype)
        return mor_linear(input, weight, base.bias, *experts, **settings, backend=self._backend)

    def gates(self, x: Tensor) -> Tensor | None:
        """Weights of the experts, then of the bypass: (..., K) -> (..., G), fp32 or wider; None without a router."""
        if self.mor_router is None:
            return None
        return mor_gates(x, self.mor_router.weight.to(x.dtype), self.mor_router.bias)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What the adapter adds to ``base``, by name relative to the layer."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith("base.")}

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        self._backend = name

    @property
    def weight(self) -> Tensor:
        """W of the base, (O, K)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """b of the base, (O,)."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def extra_repr(self) -> str:
        config = self.config
        weight, backend = stored_weight(self.base), self.backend
        if backend == "auto":
            columns = sum(config.ranks) + config.router_outputs
            backend = choose_backend(backend, weight.device, weight.dtype, columns=columns)
        parts = [
            f"ranks={config.ranks}",
            f"scaling={config.scaling}",
            f"bypass={config.bypass}",
            f"backend={backend}",
        ]
        if self._calls_base:
            parts.append("base is called")
        elif not is_matrix(weight):  # sharded by FSDP2, whose forward has it in whole, or quantised since
            parts.append(f"base is called while its weight is a {type(weight).__name__} of {weight.dtype}")
        if config.dropout:
            parts.append(f"dropout={config.dropout}")
        if not self.enabled:
            parts.append("disabled")
        return ", ".join(parts)


def new_adapter(
    config: MoRConfig, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device | None
) -> tuple[nn.Parameter, nn.Parameter, nn.Linear | None]:
    """A (R, K), B (R, O) and the router of a new adapter, which changes nothing yet.

    They are fp32 where ``dtype``, that of the base, is narrower, so that small updates are not rounded away.
    """
    dtype, total = torch.promote_types(dtype, torch.float32), sum(config.ranks)
    A = nn.Parameter(torch.empty(total, in_features, dtype=dtype, device=device))
    B = nn.Parameter(torch.empty(total, out_features, dtype=dtype, device=device))
    router = None
    if config.router_outputs:
        router = nn.Linear(in_features, config.router_outputs, dtype=dtype, device=device)
    reset_adapter(A, B, router)
    return A, B, router


def reset_adapter(A: Tensor, B: Tensor, router: nn.Linear | None) -> None:
    """Draw A and the router anew and set B to zero."""
    # The bound depends on the number of inputs alone, so one call serves experts of all ranks.
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B)
    if router is not None:
        router.reset_parameters()


def call_arguments(
    input: Tensor, A: Tensor, B: Tensor, router: nn.Linear | None, config: MoRConfig, *, training: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What :func:`mor.mor_linear` and :func:`mor_branch` are to be called with, after the base's own tensors."""
    dropped = F.dropout(input, config.dropout) if training and config.dropout else None
    experts = (A, B, None if router is None else router.weight, None if router is None else router.bias)
    settings = {"ranks": config.ranks, "scaling": config.scaling, "bypass": config.bypass, "expert_input": dropped}
    return experts, settings


def mor_layers(model: nn.Module) -> dict[str, MoRLinear]:
    """The Mixture-of-Ranks layers of a model by full name, in the model's order."""
    return {name: module for name, module in original(model).named_modules() if isinstance(module, MoRLinear)}


def set_requires_grad(parameter: Tensor, value: bool) -> None:
    """As ``requires_grad_``, also for what was made under torch.inference_mode, where torch allows it only there."""
    with torch.inference_mode(parameter.is_inference()):
        parameter.requires_grad_(value)


def has_hooks(base: nn.Module) -> bool:
    """Whether something runs around the layer's forward, which would not run around its weight."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return any(hooks) or "forward" in vars(base)


def is_plain(base: Any) -> bool:
    """Whether ``base`` does nothing but W x + b, with a matrix that can be used in its place."""
    if type(base).forward is not nn.Linear.forward or "weight" in getattr(base, "parametrizations", ()):
        return False
    return is_matrix(base.weight)


def is_matrix(weight: Tensor) -> bool:
    """Whether it is a plain matrix of floats, which can be multiplied with as it is."""
    return (type(weight) in PLAIN or isinstance(weight, TRACED)) and weight.is_floating_point()


def stored_weight(base: nn.Linear) -> Tensor:
    """``base.weight``, or what a parametrised one is computed from: to read that may change buffers (spectral_norm)."""
    parametrizations: Any = getattr(base, "parametrizations", {})
    return next(parametrizations["weight"].parameters()) if "weight" in parametrizations else base.weight
