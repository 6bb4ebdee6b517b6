"""Putting Mixture-of-Ranks layers into a model, and taking them out again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from mor.config import MoRConfig, make_config
from mor.hosts import HostChange, lost_hosts, prepare, restore
from mor.inspection import check, refuse_adapted
from mor.layer import MoRLinear, has_hooks, mor_layers, set_requires_grad
from mor.roles import resolve
from mor.wrappers import original, refuse_distributed, refuse_peft

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Injection:
    """What was done to a model; kept on it, so that it can be saved, repeated and undone."""

    config: MoRConfig
    names: tuple[str, ...]
    requires_grad: Mapping[str, bool]  # of every parameter before
    host_changes: tuple[HostChange, ...]
    backend: str = "auto"
    extra: tuple[str, ...] = ()  # names of other parts that were loaded with the adapters


def inject(
    model: Model,
    targets: str | Sequence[str],
    config: MoRConfig | None = None,
    *,
    exclude: str | Sequence[str] = (),
    layers: int | Iterable[int] | None = None,
    example: Any = None,
    backend: str = "auto",
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
            nn.MultiheadAttention keeps in ``in_proj_weight`` is called ``in_proj``. "all" warns of linear layers in
            a block that have no role.
        config: Settings of the layers; the default is :class:`mor.MoRConfig`'s.
        exclude: Roles or patterns of layers to leave alone.
        layers: Numbers of the blocks to adapt, from 0, negative from the end; None: all. Blocks are counted in the
            order in which they were registered, in a model with two towers those of one before those of the other.
        example: Inputs of the model, with which :func:`mor.check` is to find out that every adapter is alive.
        backend: How the layers compute, see :func:`mor.mor_linear`; may be set on each at any time.
        **config_fields: Fields of :class:`mor.MoRConfig`, in place of ``config`` or on top of it.

    Returns:
        The model itself.

    Raises:
        ValueError: a target or exclusion matches nothing (the message lists candidates), a block does not
            exist, a layer could not be adapted or would never be called by the module around it, an adapter is
            found dead with ``example``, or the model has Mixture-of-Ranks layers, or peft's, already, or was given
            to DistributedDataParallel or fully_shard.
        TypeError: an argument is of another kind.

    >>> block = nn.ModuleDict({"attn": nn.Identity(), "mlp": nn.ModuleDict({"fc1": nn.Linear(8, 32)})})
    >>> model = inject(nn.Sequential(block), targets="fc")
    >>> sorted(trainable_parameters(model))[:2]
    ['0.mlp.fc1.mor_A', '0.mlp.fc1.mor_B']
    """
    plain, config = original(model), make_config(config, config_fields)
    refuse_adapted(plain)
    inject_names(plain, resolve(plain, targets, exclude, layers), config, backend)
    if example is not None:
        try:
            check(plain, example)
        # Whatever it was, Ctrl-C included.
        except BaseException:
            eject(plain)
            raise
    return model


def inject_names(model: nn.Module, names: Iterable[str], config: MoRConfig, backend: str = "auto") -> None:
    """Adapt exactly the layers of these full names, all or none; freeze everything else."""
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = tuple(names)
    refuse_distributed(model)
    _refuse_hooks(model, names)
    host_changes: tuple[HostChange, ...] = ()
    adapted: dict[nn.Module, MoRLinear] = {}
    try:
        host_changes = prepare(model, names)
        for base in map(model.get_submodule, names):
            if base not in adapted:
                adapted[base] = MoRLinear(base, config, backend=backend)  # type: ignore[arg-type]
        replace_modules(model, adapted)
        for parameter in model.parameters():
            set_requires_grad(parameter, False)
        for layer in adapted.values():
            layer.train(layer.base.training)
            for parameter in layer.adapter_parameters().values():
                parameter.requires_grad_(True)
        _remember(model, Injection(config, names, requires_grad, host_changes, backend))
    # Whatever it was, Ctrl-C included.
    except BaseException:
        replace_modules(model, {layer: base for base, layer in adapted.items()})
        restore(model, host_changes)
        _set_requires_grad(model, requires_grad)
        raise


def eject(model: Model) -> Model:
    """Put the original layers back (the same objects), and restore everything that :func:`inject` changed.

    What :func:`mor.load` read besides adapters, such as a head, stays. Modules that were removed from the model since
    then are not looked for.

    Raises:
        ValueError: the model was not injected, or modules were moved to other names, so that it is not known any more
            what to restore.
    """
    plain, injection = original(model), injection_of(model)
    if lost_hosts(plain, injection.host_changes):
        refuse_moved(plain, injection)
    replace_modules(plain, {layer: layer.base for layer in mor_layers(plain).values()})
    restore(plain, injection.host_changes)
    _set_requires_grad(plain, injection.requires_grad)
    del plain._mor_injection
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes as if it had no adapters.

    Raises:
        ValueError: it has none.

    >>> model = inject(nn.Sequential(nn.Linear(2, 2)), targets="0")
    >>> with disabled(model):
    ...     model[0].enabled
    False
    """
    layers = mor_layers(model).values()
    if not layers:
        refuse_peft(model, "`with model.disable_adapter():`")
        raise ValueError("the model has no Mixture-of-Ranks layers to disable; call mor.inject on it first")
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
    return {name: parameter for name, parameter in original(model).named_parameters() if parameter.requires_grad}


def injection_of(model: nn.Module) -> Injection:
    """The record that :func:`inject` left on the model."""
    injection = find_injection(model)
    if injection is None:
        refuse_peft(model, "its own save_pretrained, and unload() to take adapters out")
        raise ValueError(
            "the model has no Mixture-of-Ranks layers; call mor.inject on it, or pass the module it was called on"
        )
    return injection


def find_injection(model: nn.Module) -> Injection | None:
    """The record that :func:`inject` left on the model, if it did."""
    return getattr(original(model), "_mor_injection", None)


def adapted_names(model: nn.Module, injection: Injection) -> list[str]:
    """Those of the injection's layers that the model still has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return [name for name in injection.names if isinstance(modules.get(name), MoRLinear)]


def refuse_moved(model: nn.Module, injection: Injection) -> None:
    """Raise ValueError if the model has adapted layers where the injection put none."""
    if moved := [name for name in mor_layers(model) if name not in injection.names]:
        raise ValueError(
            f"the model has Mixture-of-Ranks layers that mor.inject did not put there ({moved[0]}, ...); put modules"
            " back to where they were then, or call mor.eject before they are moved"
        )


def remember_extra(model: nn.Module, names: Iterable[str]) -> None:
    """These other parts were loaded with the adapters, and are to be saved with them again."""
    injection = injection_of(model)
    _remember(original(model), replace(injection, extra=tuple(dict.fromkeys((*injection.extra, *names)))))


def _remember(model: nn.Module, injection: Injection) -> None:
    model._mor_injection = injection  # type: ignore[assignment]


def _refuse_hooks(model: nn.Module, names: Iterable[str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    if hooked := [name for name in names if name in modules and has_hooks(modules[name])]:
        raise ValueError(
            f"layers with forward hooks, or a forward of their own, which would no longer run, cannot be adapted:"
            f" {', '.join(hooked[:8])}; remove the hooks (legacy weight_norm: torch.nn.utils.remove_weight_norm), or"
            " leave the layers out with exclude=[...]"
        )


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
            set_requires_grad(parameter, requires_grad[name])
