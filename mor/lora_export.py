"""The nearest LoRA of a Mixture-of-Ranks adapter, which plain peft can load and merge, and what it costs.

Shapes: T tokens, K in, O out, R sum of ranks.
"""

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.checkpoint import portable, tensors_to_save
from mor.gates import record_gates
from mor.hosts import REPLACEMENTS, BorrowedLinear, HostChange
from mor.injection import mor_layers, replace_modules
from mor.layer import MoRLinear
from mor.peft_format import CARD_HEAD, modules_to_save, refuse_foreign_files, write_peft_folder
from mor.roles import collapse
from mor.wrappers import as_written

OUTPUTS = "outputs of the model"

_CARD = """
A LoRA made from a Mixture-of-Ranks adapter: its gates, which depend on the token, are frozen at their mean over
calibration data. {use} What freezing changes on the data it was measured on:

```
{report}
```
"""


@dataclass(frozen=True)
class Cost:
    """Relative errors of vectors y', which ought to be y.

    Attributes:
        overall: Over all vectors together, sqrt(sum |y' - y|^2 / sum |y|^2).
        max: The largest |y' - y| / |y| of one vector.
        of_update: For a layer, the error relative to what its adapter adds, over all vectors together:
            sqrt(sum |y' - y|^2 / sum |y - base(x)|^2). None for the model's outputs.
        count: How many vectors.
    """

    overall: float
    max: float
    of_update: float | None
    count: int


@dataclass(frozen=True)
class LoraReport:
    """What the LoRA that :func:`to_lora` wrote costs; ``print`` it.

    Attributes:
        rank: R, of the layer with the largest.
        layers: By name; each layer given the inputs that it has in the exact model.
        outputs: Of the whole model, where the layers' errors have added up. A vector is what lies along the last
            dimension of an output of up to three dimensions; of others, such as maps (B, C, H, W), one image's.
        agreement: Share of output vectors whose largest entry is in the same place; None where that says nothing,
            because vectors have one entry or outputs more than three dimensions.
        only_merged: Layers whose weights the plain model reads, in evaluation at least, instead of calling them. With
            such layers the LoRA is right only after ``merge_and_unload``.
    """

    rank: int
    layers: Mapping[str, Cost]
    outputs: Cost
    agreement: float | None
    only_merged: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, (*self.layers, OUTPUTS)))
        lines = [f"{'relative error':{width}}  {'overall':>8}  {'max':>8}  of update"]
        for name, cost in self.layers.items():
            lines.append(f"{name:{width}}  {cost.overall:8.2%}  {cost.max:8.2%}  {cost.of_update:9.2%}")
        outputs = self.outputs
        lines.append(f"{OUTPUTS:{width}}  {outputs.overall:8.2%}  {outputs.max:8.2%}")
        if self.agreement is not None:
            lines.append(f"the largest output is the same for {self.agreement:.2%} of {outputs.count}")
        if self.only_merged:
            lines.append(_merge_first(self.only_merged))
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

    Where :func:`mor.inject` had to make the model call a layer, the plain model does not, and peft's LoRA in there is
    without effect until it is merged: a warning, the report and the folder's README.md say so then.

    Args:
        model: An injected model, also one that peft injected, with one active adapter, or that torch.compile wrapped.
            It runs in evaluation mode, without gradients, and is left as it was.
        batches: The model's inputs: tensors, tuples of positional or dictionaries of keyword arguments; no labels.
            All of them are kept in memory, unless ``held_out`` is given.
        directory: Made if need be; an adapter that is there is replaced, with its README.md.
        extra: As in :func:`mor.save`, e.g. ``"head.*"`` for a trained head; becomes peft's modules_to_save.
        held_out: Other inputs, on which the cost is measured; None: ``batches`` again.

    Returns:
        The errors per layer and of the model's outputs (``logits``, or the first tensor, that it returns).

    Raises:
        ValueError: the model was not injected, its adapters are disabled or some cannot be told to peft (what an
            nn.MultiheadAttention keeps in ``in_proj_weight`` is no layer), there are no batches, a layer sees no
            token in them, values are not finite, peft cannot hold ``extra``, or the directory has files of others.
        TypeError: ``batches`` is one batch.

    Source of the layer: arXiv 2603.17514, section 3.4.

    >>> import tempfile
    >>> from mor import inject
    >>> model = inject(nn.Sequential(nn.Linear(4, 3)), targets="0")
    >>> to_lora(model, [torch.randn(5, 4)], tempfile.mkdtemp()).agreement
    1.0
    """
    for name, value in (("batches", batches), ("held_out", [] if held_out is None else held_out)):
        _check_batches(name, value)
    refuse_foreign_files(directory)
    with _uncompiled(model) as plain:
        if not hasattr(plain, "peft_config"):
            return _export(plain, batches, directory, _as_list(extra), held_out)
        from mor.peft_plugin import as_injected

        with as_injected(plain) as (inside, trained):
            return _export(inside, batches, directory, [*trained, *_as_list(extra)], held_out)


def _export(
    model: nn.Module,
    batches: Iterable[Any],
    directory: str | os.PathLike[str],
    extra: Sequence[str],
    held_out: Iterable[Any] | None,
) -> LoraReport:
    layers = mor_layers(model)
    _refuse_unfit(layers)
    parts, tensors = tensors_to_save(model, extra, stacklevel=4)
    modules = modules_to_save(parts, list(layers), model.state_dict())
    tensors = {name: tensors[name] for name in parts}
    batches = _some("batches", batches)
    measured = ("batches", batches := list(batches)) if held_out is None else ("held_out", _some("held_out", held_out))
    with _evaluating(model):
        gates = _mean_gates(model, layers, batches)
        factors = {name: _freeze(layer, gates[name]) for name, layer in layers.items()}
        report = _measure(model, layers, factors, *measured)
    use = "peft loads and merges it as any other."
    if only_merged := _only_merged(model, layers):
        report = dataclasses.replace(report, only_merged=only_merged)
        use = _merge_first(only_merged)
    for name, (A, B) in factors.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = portable(A), portable(B)
    write_peft_folder(
        directory,
        _describe(factors, _targets(model, layers), modules),
        tensors,
        CARD_HEAD + _CARD.format(use=use, report=report),
    )
    if only_merged:
        warnings.warn(use, stacklevel=3)
    return report


def _check_batches(name: str, batches: Any) -> None:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be several batches, such as the list [x] or a data loader, got {type(batches).__name__}"
        )


def _some(name: str, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; an error at their end if there were none."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError(f"{name} must hold at least one batch, but is empty (or a generator that is used up)")


def _refuse_unfit(layers: Mapping[str, MoRLinear]) -> None:
    if not layers:
        raise ValueError("model must have Mixture-of-Ranks layers, but has none; call mor.inject on it first")
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("the adapters must be enabled to be measured; leave mor.disabled first")
    if borrowed := [name for name, layer in layers.items() if isinstance(layer.base, BorrowedLinear)]:
        raise ValueError(
            f"peft has no layer for {_collapsed(borrowed)}, whose weights are bare parameters of an attention in the"
            " plain model; leave them out with exclude= when injecting, or keep the Mixture-of-Ranks adapter"
        )


def _only_merged(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Layers that are called because of what was changed in a host, so not in the plain model."""
    changes = list(_host_changes(model))
    return tuple(name for name in names if any(_concerns(host, change, name) for host, change in changes))


def _host_changes(model: nn.Module) -> Iterator[tuple[str, HostChange]]:
    """Every change, and the full name of the module that was changed."""
    for name, module in model.named_modules():
        injection = vars(module).get("_mor_injection")
        changes = vars(module).get("_mor_host_changes", ()) if injection is None else injection.host_changes
        for change in changes:
            # A model that was compiled before it was injected has another name in between.
            path = [part for part in f"{name}.{change.module}".split(".") if part not in ("", "_orig_mod")]
            yield ".".join(path), change


def _concerns(host: str, change: HostChange, name: str) -> bool:
    prefix = f"{host}." if host else ""
    if not name.startswith(prefix):
        return False
    if change.attribute == "__class__":
        replaced = REPLACEMENTS[f"{change.before.__module__}.{change.before.__qualname__}"]
        return name.removeprefix(prefix) in replaced.calls
    # The other flags are of hosts that bypass everything in them.
    return change.attribute != "qkv_bias_separate" or name.removeprefix(prefix) == "qkv"


def _merge_first(names: Iterable[str]) -> str:
    return (
        "This LoRA works only after merging (merge_and_unload): the plain model reads the weights of"
        f" {_collapsed(names)}, and need not call them."
    )


def _collapsed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(map(collapse, names)))


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
        if wrong := [name for name in routed if not all(map(math.isfinite, gates[name]))]:
            raise ValueError(f"batches must give finite values, but the gates are not finite in {_collapsed(wrong)}")
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
        self.count = 0

    def add(self, exact: Tensor, frozen: Tensor, update: Tensor | None = None) -> None:
        difference, size = _norms(frozen - exact), _norms(exact)  # (T,)
        change = torch.zeros_like(size) if update is None else _norms(update)
        self._sums.append(torch.stack([norms.square().sum() for norms in (difference, size, change)]))
        if len(size):
            # Where both are zero there is no error.
            self._largest.append((difference / size.clamp_min(torch.finfo(size.dtype).tiny)).max())
        self.count += len(size)

    def cost(self, of_update: bool) -> Cost:
        difference, size, change = torch.stack(self._sums).sum(0).tolist()
        of = _ratio(difference, change) if of_update else None
        return Cost(_ratio(difference, size), float(torch.stack(self._largest).max()), of, self.count)


def _ratio(squared: float, of: float) -> float:
    return math.sqrt(squared / of) if of else math.inf if squared else 0.0


def _norms(vectors: Tensor) -> Tensor:
    return vectors.reshape(-1, vectors.shape[-1] if vectors.ndim else 1).double().norm(dim=-1)


def _measure(
    model: nn.Module,
    layers: Mapping[str, MoRLinear],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    what: str,
    batches: Iterable[Any],
) -> LoraReport:
    by_layer = {name: _Errors() for name in layers}
    outputs, agreeing = _Errors(), []

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
        if not exact.isfinite().all():
            raise ValueError(f"{what} must give finite values, but the model's outputs are not finite")
        outputs.add(*(y if y.ndim <= 3 else y.flatten(1) for y in (exact, frozen)))
        agreeing.append(_agreeing(exact, frozen))
    if unseen := [name for name, errors in by_layer.items() if not errors.count]:
        raise ValueError(f"{what} must reach every adapted layer, but none reached {', '.join(unseen)}")
    costs = {name: errors.cost(of_update=True) for name, errors in by_layer.items()}
    agreed = [count for count in agreeing if count is not None]
    agreement = sum(agreed) / outputs.count if len(agreed) == len(agreeing) else None
    return LoraReport(max(len(A) for A, _ in factors.values()), costs, outputs.cost(of_update=False), agreement)


def _agreeing(exact: Tensor, frozen: Tensor) -> int | None:
    """How many vectors have their largest entry in the same place; None if they are no scores of classes."""
    if not 1 <= exact.ndim <= 3 or exact.shape[-1] < 2:
        return None
    return int((exact.argmax(-1) == frozen.argmax(-1)).sum())


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


def _inside(module: nn.Module) -> nn.Module:
    # Wrappers of torch.compile are told by their child: to import their class takes seconds.
    return module._modules.get("_orig_mod") or module


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context nothing is wrapped by torch.compile, whose wrappers have names of their own."""
    model = _inside(model)
    wrapped = {module: _inside(module) for module in model.modules() if _inside(module) is not module}
    replace_modules(model, wrapped)
    try:
        yield model
    finally:
        replace_modules(model, {original: wrapper for wrapper, original in wrapped.items()})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), as_written():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    try:
        return model(*batch)
    except Exception as error:
        # Most likely labels from a data loader, but what a second argument means only the model knows.
        if len(batch) < 2 or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"a batch must be a tensor, a tuple of the model's positional arguments or a dict of keyword arguments, so"
            f" without labels ([x for x, _ in loader]); with {len(batch)} arguments the model fails: {error}"
        ) from error


def _output(output: Any) -> Tensor:
    """The tensor to judge by: what the model returns, its ``logits``, or the first tensor of floats in it."""
    for tensor in _tensors(getattr(output, "logits", output)):
        if tensor.is_floating_point():
            return tensor
    raise ValueError(f"the model must return floating-point tensors to be measured, got {type(output).__name__}")


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif dataclasses.is_dataclass(output):
        yield from _tensors(vars(output))


def _as_list(values: str | Sequence[str]) -> list[str]:
    return [values] if isinstance(values, str) else list(values)
