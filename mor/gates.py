"""What the routers do: gates recorded while a model runs, and their summary per layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mor.injection import mor_layers
from mor.layer import MoRLinear
from mor.wrappers import as_written, refuse_peft


@dataclass(frozen=True)
class GateSummary:
    """Means over all tokens that a layer has seen.

    Attributes:
        gates: Weight of each expert, in the order of ``ranks``.
        bypass: Weight of the bypass; None if the router has none.
        entropy: Of the gates, the bypass among them, in nats; log(number of outputs) is indifference.
        effective_rank: sum_i g_i r_i, the rank that a token uses on average.
        tokens: How many tokens.
    """

    gates: tuple[float, ...]
    bypass: float | None
    entropy: float
    effective_rank: float
    tokens: int


class GateRecord:
    """Sums over tokens, kept on the layers' own devices until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._layers: dict[str, MoRLinear] = {}

    def add(self, name: str, layer: MoRLinear, x: Tensor) -> None:
        """Count the tokens of ``x`` (..., K) for a layer; nothing waits for the device."""
        with torch.no_grad():
            gates = layer.gates(x.detach())
            if gates is None:
                return
            gates = gates.reshape(-1, gates.shape[-1])
            entropy = torch.special.entr(gates).sum(1, keepdim=True)
            # Summed in fp64: millions of fp32 terms would drift.
            sums = torch.cat([gates, entropy], dim=1).sum(0, dtype=torch.float64)
        self._layers[name] = layer
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._tokens[name] = self._tokens.get(name, 0) + len(gates)

    def summary(self) -> dict[str, GateSummary]:
        """By layer, in the order of first use; layers that saw no token, or have no router, are left out."""
        return {name: self._summarise(name) for name in self._sums if self._tokens[name]}

    def _summarise(self, name: str) -> GateSummary:
        *gates, entropy = (self._sums[name] / self._tokens[name]).tolist()
        config = self._layers[name].config
        bypass = gates.pop() if config.bypass else None
        rank = sum(gate * rank for gate, rank in zip(gates, config.ranks, strict=True))
        return GateSummary(tuple(gates), bypass, entropy, rank, self._tokens[name])


@contextmanager
def record_gates(model: nn.Module) -> Iterator[GateRecord]:
    """Record what every router of the model does within the context. Compiled parts run as they were written meanwhile.

    For a model that peft wrapped, give it the one that :func:`mor.peft_plugin.as_injected` makes of it.

    Raises:
        ValueError: the model has no Mixture-of-Ranks layer with a router.

    >>> from mor import inject
    >>> model = inject(nn.Sequential(nn.Linear(2, 2)), targets="0")
    >>> with record_gates(model) as record:
    ...     _ = model(torch.zeros(3, 2))
    >>> record.summary()["0"].tokens
    3
    """
    layers = {name: layer for name, layer in mor_layers(model).items() if layer.mor_router is not None}
    if not layers:
        refuse_peft(model, "mor.peft_plugin.as_injected(peft_model), which gives a model for mor.record_gates")
        raise ValueError("the model has no Mixture-of-Ranks layer with a router, so there are no gates to record")
    record = GateRecord()

    def hook(name: str) -> Any:
        def add(layer: MoRLinear, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            if layer.enabled:
                record.add(name, layer, args[0] if args else kwargs["input"])

        return add

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with as_written():
            yield record
    finally:
        for handle in handles:
            handle.remove()
