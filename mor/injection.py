"""Putting Mixture-of-Ranks layers into a model, and taking them out again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from mor.config import MoRConfig
from mor.hosts import HostChange, prepare, restore
from mor.inspection import check, refuse_injected
from mor.layer import MoRLinear, mor_layers
from mor.roles import resolve

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Injection:
    """What was done to a model; kept on it, so that it can be saved, repeated and undone."""

    config: MoRConfig
    names: tuple[str, ...]
    requires_grad: Mapping[str, bool]  # of every parameter before
    host_changes: tuple[HostChange, ...]


def inject(
    model: Model,
    targets: str | Sequence[str],
    config: MoRConfig | None = None,
    *,
    exclude: str | Sequence[str] = (),
    layers: int | Iterable[int] | None = None,
    example: Any = None,
    **config_fields: Any,
) -> Model:
    """Replace linear layers by Mixture-of-Ranks layers, in place, and freeze everything but the adapters.

    The model computes the same as before until the adapters are trained. Parts that are to be trained
    besides, such as a new head, are unfrozen by the caller afterwards. If anything is wrong, the model is
    left as it was.

    Args:
        model: A Vision Transformer, or any module that contains nn.Linear layers.
        targets: Roles "qkv", "proj", "fc" (all layers of the MLP), "fc1", "fc2", "all", which are looked for inside
            transformer blocks only; any other string is an fnmatch pattern of the full dotted name. What an
            nn.MultiheadAttention keeps in ``in_proj_weight`` is called ``in_proj``.
        config: Settings of the layers; the default is :class:`mor.MoRConfig`'s.
        exclude: Roles or patterns of layers to leave alone.
        layers: Numbers of the blocks to adapt, from 0 in forward order, negative from the end; None: all.
        example: Inputs of the model, with which :func:`mor.check` is to find out that every adapter is alive.
        **config_fields: Fields of :class:`mor.MoRConfig`, in place of ``config`` or on top of it.

    Returns:
        The model itself.

    Raises:
        ValueError: a target or exclusion matches nothing (the message lists candidates), a block does not
            exist, a layer could not be adapted or would never be called by the module around it, an adapter is
            found dead with ``example``, or the model has Mixture-of-Ranks layers already.

    >>> block = nn.ModuleDict({"attn": nn.Identity(), "mlp": nn.ModuleDict({"fc1": nn.Linear(8, 32)})})
    >>> model = inject(nn.Sequential(block), targets="fc")
    >>> sorted(trainable_parameters(model))[:2]
    ['0.mlp.fc1.mor_A', '0.mlp.fc1.mor_B']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if config_fields:
        config = replace(config, **config_fields) if config else MoRConfig(**config_fields)
    refuse_injected(model)
    inject_names(model, resolve(model, targets, exclude, layers), config or MoRConfig())
    if example is not None:
        try:
            check(model, example)
        except Exception:
            eject(model)
            raise
    return model


def inject_names(model: nn.Module, names: Iterable[str], config: MoRConfig) -> None:
    """Adapt exactly the layers of these full names, all or none; freeze everything else."""
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = tuple(names)
    host_changes = prepare(model, names)
    try:
        adapted = {base: MoRLinear(base, config) for base in map(model.get_submodule, names)}  # type: ignore[arg-type]
    except Exception:
        restore(model, host_changes)
        _set_requires_grad(model, requires_grad)
        raise
    replace_modules(model, adapted)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in adapted.values():
        layer.train(layer.base.training)
        for parameter in layer.adapter_parameters().values():
            parameter.requires_grad_(True)
    model._mor_injection = Injection(config, names, requires_grad, host_changes)  # type: ignore[assignment]


def eject(model: Model) -> Model:
    """Put the original layers back (the same objects), and restore everything that :func:`inject` changed.

    Raises:
        ValueError: the model was not injected.
    """
    injection = injection_of(model)
    replace_modules(model, {layer: layer.base for layer in mor_layers(model).values()})
    restore(model, injection.host_changes)
    _set_requires_grad(model, injection.requires_grad)
    del model._mor_injection
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes as if it had no adapters.

    >>> model = inject(nn.Sequential(nn.Linear(2, 2)), targets="0")
    >>> with disabled(model):
    ...     model[0].enabled
    False
    """
    layers = mor_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimiser should get: every parameter that requires a gradient, by full name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def injection_of(model: nn.Module) -> Injection:
    """The record that :func:`inject` left on the model."""
    injection = getattr(model, "_mor_injection", None)
    if injection is None:
        raise ValueError(
            "the model has no Mixture-of-Ranks layers; call mor.inject on it, or pass the module it was called on"
        )
    return injection


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the places of some."""
    # A module may hang in several places; every one of them must lead to its replacement.
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def _set_requires_grad(model: nn.Module, requires_grad: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if name in requires_grad:
            parameter.requires_grad_(requires_grad[name])
