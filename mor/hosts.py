"""Hosts that compute with a layer's weight instead of calling the layer: made to call it, or refused.

An adapter sits around a layer's ``forward``. Where the module around it reads ``weight`` and goes its own way, the
adapter would be silently dead. What helps, in this order: a flag that the host itself has; another class for the
host, which computes the same and calls its layers; and if neither is known, an error before anything is changed.

A change is one attribute of one module, ``__class__`` included, so that it can be undone exactly; and it is kept by
name, so that it survives copying and pickling.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Replacement:
    """A class that does what the host's class does, and calls its projections."""

    file: str
    name: str
    calls: tuple[str, ...]


# Imported only when a model has such a host, whose own library is then imported already.
REPLACEMENTS = {
    "torch.nn.modules.activation.MultiheadAttention": Replacement(
        "mor.attention", "CallingMultiheadAttention", ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")
    ),
    "open_clip.transformer.Attention": Replacement("mor.open_clip_attention", "CallingAttention", ("in_proj",)),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": Replacement(
        "mor.torchvision_attention", "CallingShiftedWindowAttention", ("qkv", "proj")
    ),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": Replacement(
        "mor.torchvision_attention", "CallingShiftedWindowAttentionV2", ("qkv", "proj")
    ),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": Replacement(
        "mor.torchvision_attention", "CallingShiftedWindowAttention3d", ("qkv", "proj")
    ),
}


@dataclass(frozen=True)
class HostChange:
    """One attribute of one module of the model."""

    module: str
    attribute: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Need:
    """What a host needs so that it calls a layer: an attribute set, or (``refusal``) something that nobody can do."""

    attribute: str = ""
    value: Any = None
    refusal: str = ""


class BorrowedLinear(nn.Linear):
    """A linear layer whose weight and bias are, and stay, parameters of the attention that it belongs to.

    Attentions that keep their projections as bare parameters (``in_proj_weight``) need a module that can be called
    and adapted. State dicts keep the attention's names, because this module has no parameters of its own.
    """

    def __init__(self, owner: nn.Module, weight: str, bias: str | None, rows: tuple[int, int] | None) -> None:
        nn.Module.__init__(self)
        # In a tuple, so that it is not registered as a child.
        self._owner = (owner,)
        self._names = (weight, bias)
        self._bias_rows = rows
        self.out_features, self.in_features = getattr(owner, weight).shape
        self.train(owner.training)

    def _replicate_for_data_parallel(self) -> Any:
        # torch tells no replica which one its parent is, so it would compute with the original's parameters.
        raise ValueError(
            f"nn.DataParallel cannot copy an attention that was made to call its layers ({self._names[0]}); use"
            " torch.nn.parallel.DistributedDataParallel, one process for each device"
        )

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return getattr(self._owner[0], self._names[0])

    @property
    def bias(self) -> Any:  # type: ignore[override]
        if self._names[1] is None:
            return None
        bias = getattr(self._owner[0], self._names[1])
        return bias if self._bias_rows is None else bias[slice(*self._bias_rows)]


def linear_names(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear layer by full name, with its inputs and outputs, and those that :func:`prepare` could make."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        for child, projection in bare_projections(module).items():
            found[f"{name}.{child}" if name else child] = (projection.in_features, projection.out_features)
    return found


def identity(model: nn.Module, name: str) -> tuple[int, str]:
    """The same for two names of one layer, and for no others."""
    parent, _, child = name.rpartition(".")
    host = model.get_submodule(parent)
    module = host._modules.get(child)
    return (id(host), child) if module is None else (id(module), "")


def refusals(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Those of the layers whose hosts cannot be made to call them, with the reason."""
    return {
        name: need.refusal for name in names for _, need in _needs(model, name) if need is not None and need.refusal
    }


def note(model: nn.Module, name: str) -> str:
    """How a layer's host will treat its adapter, in a few words; "plain" if nothing is known against it."""
    needs = [need for _, need in _needs(model, name)]
    if any(need.refusal for need in needs):
        return "refused: " + next(need.refusal for need in needs if need.refusal)
    if any(need.attribute == "__class__" for need in needs):
        return "attention replaced"
    if needs:
        return f"host flag {', '.join(dict.fromkeys(need.attribute for need in needs))}"
    return "plain"


def prepare(model: nn.Module, names: Iterable[str]) -> tuple[HostChange, ...]:
    """Change the hosts of these layers so that each name is an nn.Linear that is called; all of them, or none.

    Returns:
        What was changed, for :func:`restore`.

    Raises:
        ValueError: a host cannot be made to call its layer.
    """
    names = list(names)
    refused = refusals(model, names)
    if refused:
        name, reason = next(iter(refused.items()))
        raise ValueError(f"an adapter on {name} would do nothing: {reason}")
    changes: dict[tuple[int, str], HostChange] = {}
    for name in names:
        for host, need in _needs(model, name):
            module = model.get_submodule(host)
            before = type(module) if need.attribute == "__class__" else getattr(module, need.attribute)
            change = HostChange(host, need.attribute, before, need.value)
            changes.setdefault((id(module), need.attribute), change)
    tried = []
    try:
        for change in changes.values():
            tried.append(change)
            _make(model.get_submodule(change.module), change)
    except BaseException:
        for change in reversed(tried):
            _undo(model.get_submodule(change.module), change)
        raise
    return tuple(changes.values())


def restore(model: nn.Module, changes: Sequence[HostChange]) -> None:
    """Undo :func:`prepare`; the layers must be the original ones again. Hosts that are gone are passed over."""
    gone = lost_hosts(model, changes)
    for change in changes:
        if change not in gone:
            _undo(model.get_submodule(change.module), change)


def lost_hosts(model: nn.Module, changes: Iterable[HostChange]) -> list[HostChange]:
    """The changes to modules that are no longer in their places."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [change for change in changes if not _is_in_place(modules.get(change.module), change)]


def _is_in_place(module: nn.Module | None, change: HostChange) -> bool:
    if change.attribute == "__class__":
        return isinstance(module, change.after)
    return hasattr(module, change.attribute)


def _make(module: nn.Module, change: HostChange) -> None:
    projections = bare_projections(module) if change.attribute == "__class__" else {}
    setattr(module, change.attribute, change.after)
    for name, projection in projections.items():
        setattr(module, name, projection)


def _undo(module: nn.Module, change: HostChange) -> None:
    """Also of a change that was made only in part, or not at all."""
    if getattr(module, change.attribute) is not change.before:
        setattr(module, change.attribute, change.before)
    if change.attribute == "__class__":
        for name, child in list(module.named_children()):
            if isinstance(child, BorrowedLinear):
                delattr(module, name)


def _needs(model: nn.Module, name: str) -> Iterator[tuple[str, Need]]:
    """What stands between a layer and being called, from the layer outwards."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        host, child = ".".join(parts[:end]), ".".join(parts[end:])
        module = model.get_submodule(host)
        for rule in RULES:
            need = rule(module, child)
            if need is not None:
                yield host, need


def _separate_bias(module: nn.Module, child: str) -> Need | None:
    """BEiT, EVA and SwinV2 keep q's and v's bias apart, and put them together with qkv's weight."""
    if child != "qkv" or getattr(module, "q_bias", None) is None:
        return None
    separate = getattr(module, "qkv_bias_separate", None)
    if separate is None:
        return Need(refusal="their host adds q_bias and v_bias itself, and has no flag qkv_bias_separate; update timm")
    return None if separate else Need("qkv_bias_separate", True)


def _replaced_attention(module: nn.Module, child: str) -> Need | None:
    for kind in type(module).__mro__:
        replacement = REPLACEMENTS.get(f"{kind.__module__}.{kind.__qualname__}")
        if replacement is None or child not in replacement.calls:
            continue
        calling = getattr(importlib.import_module(replacement.file), replacement.name)
        if kind is type(module):
            return Need("__class__", calling)
        if not isinstance(module, calling):
            return Need(refusal=f"{type(module).__name__} is a {kind.__name__}, which only reads their weights")
    return None


def _encoder_layer_fast_path(module: nn.Module, child: str) -> Need | None:
    """In evaluation, the whole layer's weights go to one kernel, unless the activation is unknown to it."""
    if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
        return Need("activation_relu_or_gelu", 0)
    return None


def _nested_tensors(module: nn.Module, child: str) -> Need | None:
    """With a padding mask, evaluation goes through nested tensors, which only that kernel takes.

    They come back with zeros at the padded positions. Without them, these hold what the layers compute there, as in
    training; the others are the same.
    """
    if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
        return Need("use_nested_tensor", False)
    return None


def _attention_pool(module: nn.Module, child: str) -> Need | None:
    """The pool of CLIP's ResNets, in open_clip and elsewhere; timm's of the same name calls its layers."""
    is_clip = type(module).__name__ == "AttentionPool2d" and hasattr(module, "c_proj")
    if is_clip and child in ("q_proj", "k_proj", "v_proj", "c_proj"):
        return Need(refusal="the attention pool of CLIP's ResNet only reads their weights")
    return None


RULES: tuple[Callable[[nn.Module, str], Need | None], ...] = (
    _separate_bias,
    _replaced_attention,
    _encoder_layer_fast_path,
    _nested_tensors,
    _attention_pool,
)


def bare_projections(module: nn.Module) -> dict[str, BorrowedLinear]:
    """A layer for each projection that an attention keeps as a bare parameter."""
    is_open_clip = f"{type(module).__module__}.{type(module).__qualname__}" == "open_clip.transformer.Attention"
    if not isinstance(module, nn.MultiheadAttention) and not is_open_clip:
        return {}
    rows: dict[str, tuple[int, int] | None] = {"in_proj": None}
    if getattr(module, "in_proj_weight", None) is None:
        width: Any = getattr(module, "embed_dim", 0)
        rows = {f"{name}_proj": (i * width, (i + 1) * width) for i, name in enumerate("qkv")}
    bias = None if getattr(module, "in_proj_bias", None) is None else "in_proj_bias"
    return {
        name: BorrowedLinear(module, f"{name}_weight", bias, of_bias)
        for name, of_bias in rows.items()
        if name not in module._modules and getattr(module, f"{name}_weight", None) is not None
    }
