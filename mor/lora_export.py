"""The nearest LoRA of a Mixture-of-Ranks adapter, which plain peft can load and merge, and what it costs.

Shapes: T tokens, K in, O out, R sum of ranks.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.checkpoint import portable, tensors_to_save
from mor.gates import record_gates
from mor.injection import mor_layers
from mor.layer import MoRLinear
from mor.peft_format import CARD_HEAD, modules_to_save, write_peft_folder

OUTPUTS = "outputs of the model"

_CARD = """
A LoRA made from a Mixture-of-Ranks adapter: its gates, which depend on the token, are frozen at their mean over
calibration data. peft loads and merges it as any other. What freezing changes on the data it was measured on:

```
{report}
```
"""


@dataclass(frozen=True)
class Cost:
    """Relative errors |y' - y| / |y| of vectors y, with their mean and their maximum.

    Attributes:
        mean, max: Over all vectors.
        of_update: For a layer, the error relative to what its adapter adds, over all vectors together:
            sqrt(sum |y' - y|^2 / sum |y - base(x)|^2). None for the model's outputs.
        count: How many vectors.
    """

    mean: float
    max: float
    of_update: float | None
    count: int


@dataclass(frozen=True)
class LoraReport:
    """What the LoRA that :func:`to_lora` wrote costs; ``print`` it.

    Attributes:
        rank: R, of the layer with the largest.
        layers: By name; each layer given the inputs that it has in the exact model.
        outputs: Of the whole model, where the layers' errors have added up.
        agreement: Share of output vectors whose largest entry is in the same place.
    """

    rank: int
    layers: Mapping[str, Cost]
    outputs: Cost
    agreement: float

    def __str__(self) -> str:
        width = max(map(len, (*self.layers, OUTPUTS)))
        lines = [f"{'relative error':{width}}  {'mean':>8}  {'max':>8}  of update"]
        for name, cost in self.layers.items():
            lines.append(f"{name:{width}}  {cost.mean:8.2%}  {cost.max:8.2%}  {cost.of_update:9.2%}")
        outputs = self.outputs
        lines.append(f"{OUTPUTS:{width}}  {outputs.mean:8.2%}  {outputs.max:8.2%}")
        lines.append(f"the largest output is the same for {self.agreement:.2%} of {outputs.count}")
        return "\n".join(lines)


def to_lora(
    model: nn.Module,
    batches: Iterable[Any],
    directory: str | os.PathLike[str],
    *,
    extra: str | Sequence[str] = (),
    held_out: Iterable[Any] | None = None,
) -> LoraReport:
    r"""Write a LoRA for plain peft: every gate frozen at its mean over the tokens of ``batches``.

    .. math::
        y' = W x + b + \sum_i \bar g_i \, s_i \, B_i^T A_i x

    With gates that do not depend on the token this is exact; otherwise it is an approximation, and the report
    says how good. Rank and alpha are the sum of ranks, so that peft's own scaling is one.

    Args:
        model: An injected model, also one that peft injected, with one active adapter. It runs in evaluation mode,
            without gradients, and is left as it was.
        batches: The model's inputs: tensors, tuples of positional or dictionaries of keyword arguments.
        directory: Made if need be; an adapter that is there is replaced.
        extra: As in :func:`mor.save`, e.g. ``"head.*"`` for a trained head; becomes peft's modules_to_save.
        held_out: Other inputs, on which the cost is measured; None: ``batches`` again.

    Returns:
        The errors per layer and of the model's outputs (the first tensor, or ``logits``, that it returns).

    Raises:
        ValueError: the model was not injected, a layer sees no token in the batches, or peft cannot hold ``extra``.

    Source of the layer: arXiv 2603.17514, section 3.4.

    >>> import tempfile
    >>> from mor import inject
    >>> model = inject(nn.Sequential(nn.Linear(4, 3)), targets="0")
    >>> to_lora(model, [torch.randn(5, 4)], tempfile.mkdtemp()).agreement
    1.0
    """
    if hasattr(model, "peft_config"):
        from mor.peft_plugin import as_injected

        with as_injected(model) as (inside, trained):
            return _export(inside, batches, directory, [*trained, *_as_list(extra)], held_out)
    return _export(model, batches, directory, _as_list(extra), held_out)


def _export(
    model: nn.Module,
    batches: Iterable[Any],
    directory: str | os.PathLike[str],
    extra: Sequence[str],
    held_out: Iterable[Any] | None,
) -> LoraReport:
    layers = mor_layers(model)
    if not layers:
        raise ValueError("model must have Mixture-of-Ranks layers, but has none; call mor.inject on it first")
    parts, tensors = tensors_to_save(model, extra)
    modules = modules_to_save(parts, list(layers))
    tensors = {name: tensors[name] for name in parts}
    batches = list(batches)
    with _evaluating(model):
        gates = _mean_gates(model, layers, batches)
        factors = {name: _freeze(layer, gates[name]) for name, layer in layers.items()}
        report = _measure(model, layers, factors, batches if held_out is None else held_out)
    for name, (A, B) in factors.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = portable(A), portable(B)
    write_peft_folder(
        directory,
        _describe(factors, _targets(model, layers), modules),
        tensors,
        CARD_HEAD + _CARD.format(report=report),
    )
    return report


def _mean_gates(
    model: nn.Module, layers: Mapping[str, MoRLinear], batches: Iterable[Any]
) -> dict[str, tuple[float, ...]]:
    routed = [name for name, layer in layers.items() if layer.mor_router is not None]
    gates: dict[str, tuple[float, ...]] = {name: (1.0,) for name in layers}
    if routed:
        with record_gates(model) as record:
            for batch in batches:
                _call(model, batch)
        gates |= {name: summary.gates for name, summary in record.summary().items()}
        if unseen := [name for name in routed if name not in record.summary()]:
            raise ValueError(f"batches must reach every adapted layer, but none reached {', '.join(unseen)}")
    return gates


def _freeze(layer: MoRLinear, gates: Sequence[float]) -> tuple[Tensor, Tensor]:
    """LoRA's two matrices, (R, K) and (O, R); gates and scaling go into the second."""
    config = layer.config
    weights = [gate * scale for gate, scale in zip(gates, config.scaling, strict=True)]
    by_row = torch.tensor(weights, dtype=layer.mor_B.dtype).repeat_interleave(torch.tensor(config.ranks))  # (R,)
    return layer.mor_A.detach(), (layer.mor_B.detach() * by_row[:, None].to(layer.mor_B.device)).T


def _targets(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """Names that mean these layers alone to peft, for which a name is also the end of every longer one."""
    names = list(names)
    others = [name for name, _ in model.named_modules() if name not in names]
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(map(re.escape, names))
    return names


def _describe(
    factors: Mapping[str, tuple[Tensor, Tensor]], targets: list[str] | str, modules: Sequence[str]
) -> dict[str, Any]:
    """adapter_config.json; what is left out is as peft's LoRA has it by default."""
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    rank = max(ranks.values())
    # peft reads the keys as the ends of names, unless told where names begin.
    others = {f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": targets,
        "modules_to_save": list(modules) or None,
    }


class _Errors:
    """Sums over vectors, kept where they are computed until they are asked for."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._largest: list[Tensor] = []
        self._count = 0

    def add(self, exact: Tensor, frozen: Tensor, update: Tensor | None = None) -> None:
        difference, size = _norms(frozen - exact), _norms(exact)  # (T,)
        # Where both are zero there is no error.
        relative = difference / size.clamp_min(torch.finfo(size.dtype).tiny)
        change = torch.zeros_like(size) if update is None else _norms(update)
        self._sums.append(torch.stack([relative.sum(), difference.square().sum(), change.square().sum()]))
        if len(relative):
            self._largest.append(relative.max())
        self._count += len(relative)

    def cost(self, of_update: bool) -> Cost:
        total, difference, change = torch.stack(self._sums).sum(0).tolist()
        of = None if not of_update else (difference / change) ** 0.5 if change else 0.0
        return Cost(total / self._count, float(torch.stack(self._largest).max()), of, self._count)


def _norms(vectors: Tensor) -> Tensor:
    return vectors.reshape(-1, vectors.shape[-1] if vectors.ndim else 1).double().norm(dim=-1)


def _measure(
    model: nn.Module,
    layers: Mapping[str, MoRLinear],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    batches: Iterable[Any],
) -> LoraReport:
    by_layer = {name: _Errors() for name in layers}
    outputs, agreeing = _Errors(), 0

    def lora(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        A, B = factors[name]
        base = layers[name].base(x)
        return base, base + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)).to(base.dtype)

    def compare(name: str, x: Tensor, y: Tensor) -> None:
        base, frozen = lora(name, x)
        by_layer[name].add(y, frozen, update=y - base)

    def replace(name: str, x: Tensor, y: Tensor) -> Tensor:
        return lora(name, x)[1]

    for batch in batches:
        with _hooked(layers, compare):
            exact = _output(_call(model, batch))
        with _hooked(layers, replace):
            frozen = _output(_call(model, batch))
        outputs.add(exact, frozen)
        agreeing += int((exact.argmax(-1) == frozen.argmax(-1)).sum()) if exact.ndim else 1
    if unseen := [name for name, errors in by_layer.items() if not errors._count]:
        raise ValueError(f"the batches must reach every adapted layer, but none reached {', '.join(unseen)}")
    costs = {name: errors.cost(of_update=True) for name, errors in by_layer.items()}
    total = outputs.cost(of_update=False)
    return LoraReport(max(len(A) for A, _ in factors.values()), costs, total, agreeing / total.count)


@contextmanager
def _hooked(layers: Mapping[str, MoRLinear], act: Callable[[str, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Within the context ``act`` sees every layer's name, input and output, and may give another output."""

    def hook(name: str) -> Any:
        return lambda layer, args, kwargs, y: act(name, args[0] if args else kwargs["input"], y)

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _output(output: Any) -> Tensor:
    """The tensor to judge by: what the model returns, its ``logits``, or the first tensor in it."""
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))


def _as_list(values: str | Sequence[str]) -> list[str]:
    return [values] if isinstance(values, str) else list(values)
