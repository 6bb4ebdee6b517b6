"""Mixture-of-Ranks adapters in huggingface/peft: importing this file registers them.

    from mor.peft_plugin import MorConfig
    model = peft.get_peft_model(model, MorConfig(target_modules=["qkv", "fc"]))

What `mor` does with an injected model, it does with peft's as follows: :func:`check` here in place of mor.check;
``with as_injected(model) as (inside, _), mor.record_gates(inside) as record``; ``with model.disable_adapter()`` in
place of mor.disabled; and mor.to_lora and mor.trainable_parameters as they are.

Shapes: K in, O out, R sum of ranks, G router outputs.
"""

import copy
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mor.checkpoint import METHOD_OF_PEFT
from mor.config import MoRConfig
from mor.functional import mor_branch, mor_linear
from mor.hosts import linear_names, prepare, refusals, restore
from mor.injection import replace_modules
from mor.inspection import check as check_injected
from mor.inspection import refuse_injected
from mor.layer import MoRLinear, call_arguments, has_hooks, is_plain, new_adapter
from mor.peft_format import add_note_to_card
from mor.roles import resolve
from mor.wrappers import refuse_distributed

try:
    import peft
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, register_peft_method

    if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 18):
        raise ImportError(f"this is peft {peft.__version__}")
except ImportError as error:
    raise ImportError(
        f"mor.peft_plugin needs peft 0.18 or newer ({error}); pip install 'mixture-of-ranks[peft]' brings it"
    ) from error

CANNOT_MERGE = (
    "a Mixture-of-Ranks adapter cannot be merged or converted without loss, because its router weighs every token anew;"
    " mor.to_lora(model, batches, directory) writes the nearest LoRA, which can, and measures what that costs"
)


def _add_peft_type(name: str) -> None:
    """peft's list of methods is a closed enum, and a method that is not in it can be neither loaded nor saved."""
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


if METHOD_OF_PEFT not in PeftType.__members__:
    _add_peft_type(METHOD_OF_PEFT)


def _naming_fields(config: type["MorConfig"]) -> type["MorConfig"]:
    """Have the error about an unknown field say which there are."""
    init: Callable[..., None] = config.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [field.name for field in fields(config) if field.init]
        if unknown := [name for name in kwargs if name not in known]:
            own = [name for name in known if name in config.__annotations__]
            # peft looks for these words where a file has fields of a later version.
            raise TypeError(f"MorConfig got an unexpected keyword argument '{unknown[0]}'; it has {', '.join(own)}")
        init(self, *args, **kwargs)

    config.__init__ = checked  # type: ignore[method-assign]
    return config


@_naming_fields
@dataclass
class MorConfig(PeftConfig):
    """Settings of a Mixture-of-Ranks adapter in peft: those of :class:`mor.MoRConfig`, and where it goes.

    Args:
        ranks, alphas, bypass, dropout: See :class:`mor.MoRConfig`.
        target_modules: Full names of layers, roles and patterns as in :func:`mor.inject` ("qkv", "fc"), or the ends
            of names after a dot, as in peft; the first of these that a model has is meant. A string is a regular
            expression of full names, or one of the above, or "all-linear": every linear layer except the model's
            classifier. The model's copy of the settings, in ``model.peft_config``, has the full names of its layers,
            and is saved so; what you passed stays as it was.
        exclude_modules: Layers to leave alone, named in the same ways.
        layers_to_transform: Numbers of the blocks to adapt, for roles as in :func:`mor.inject`, for names as in peft.
        layers_pattern: Name of the list of blocks, if numbers are to be read from the layers' names, as in peft.
        modules_to_save: Modules to train and save besides, such as a new head.
        init_weights: False makes the new adapter change the output at once; for tests.

    Raises:
        ValueError, TypeError: a field does not make sense; the message names it.

    >>> MorConfig(target_modules=["qkv", "fc"], ranks=[2, 4]).mor.scaling
    (2.0, 2.0)
    """

    ranks: Sequence[int] = MoRConfig.ranks
    alphas: Sequence[float] | None = MoRConfig.alphas
    bypass: bool = MoRConfig.bypass
    dropout: float = MoRConfig.dropout
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD_OF_PEFT]
        for name, value in vars(self.mor).items():
            setattr(self, name, value)
        # Tuples, because sets are written to the file in an order that changes from run to run.
        self.target_modules = _as_tuple("target_modules", self.target_modules)
        self.exclude_modules = _as_tuple("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}")
        numbers = self.layers_to_transform
        for number in numbers if isinstance(numbers, (list, tuple)) else () if numbers is None else (numbers,):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"layers_to_transform must be a whole number or a list of them, got {numbers!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_to_transform must be given where layers_pattern is, got None")

    @property
    def mor(self) -> MoRConfig:
        """The layer's own settings, checked."""
        return MoRConfig(ranks=self.ranks, alphas=self.alphas, bypass=self.bypass, dropout=self.dropout)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into the folder's README.md what has to be imported to load it."""
        super().save_pretrained(save_directory, **kwargs)
        add_note_to_card(Path(save_directory))


class MorLinear(nn.Module, BaseTunerLayer):
    """peft's layer: ``base_layer`` and any number of Mixture-of-Ranks adapters by name.

    Attributes:
        mor_A: (R, K) by adapter.
        mor_B: (R, O) by adapter.
        mor_router: nn.Linear(K, G) by adapter, except where a single expert has no bypass.
        mor_config: Settings by adapter.
    """

    adapter_layer_names = ("mor_A", "mor_B", "mor_router")
    other_param_names = ("mor_config",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MorConfig) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.in_features: int = self.get_base_layer().in_features  # type: ignore[assignment]
        self.out_features: int = self.get_base_layer().out_features  # type: ignore[assignment]
        self.mor_A, self.mor_B = nn.ParameterDict(), nn.ParameterDict()
        self.mor_router = nn.ModuleDict()
        self.mor_config: dict[str, MoRConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, config: MorConfig) -> None:
        """Add an adapter, or begin one anew."""
        device, dtype = _device_and_dtype(self.get_base_layer())
        A, B, router = new_adapter(config.mor, self.in_features, self.out_features, dtype=dtype, device=device)
        if not config.init_weights:
            nn.init.kaiming_uniform_(B)
        self.mor_A[adapter_name], self.mor_B[adapter_name] = A, B
        if router is not None:
            self.mor_router[adapter_name] = router
        self.mor_config[adapter_name] = config.mor
        # To the dtype of the base; with autocast_adapter_dtype, peft goes back to fp32 from there.
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def adapters(self) -> tuple[Any, list[dict[str, Any]]]:
        """Which are active, and what there is of each, for :meth:`set_adapters`."""
        return self._active_adapter, [dict(holder.items()) for holder in self._holders]

    def set_adapters(self, active: Any, contents: Iterable[Mapping[str, Any]]) -> None:
        """Bring back what :meth:`adapters` gave, and nothing else."""
        self._active_adapter = active
        for holder, content in zip(self._holders, contents, strict=True):
            holder.clear()
            holder.update(content)

    @property
    def _holders(self) -> tuple[Any, ...]:
        return self.mor_A, self.mor_B, self.mor_router, self.mor_config

    def forward(self, input: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(..., K) -> (..., O), with the active adapters; or with one for each row of the batch, if named."""
        if self.disable_adapters:
            return self.base_layer(input, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(input, adapter_names, self.base_layer(input, *args, **kwargs))
        names = self.active_here
        if names and is_plain(self.base_layer) and not has_hooks(self.base_layer):
            tensors, settings = self._adapter(names[0], input)
            y = mor_linear(input, self.base_layer.weight, self.base_layer.bias, *tensors, **settings)
            names = names[1:]
        else:
            y = self.base_layer(input, *args, **kwargs)
        for name in names:
            y = y + self._branch(name, input).to(y.dtype)
        return y

    @property
    def active_here(self) -> list[str]:
        """Names of the active adapters that this layer has; not every adapter is in every layer."""
        return [name for name in self.active_adapters if name in self.mor_A]

    def _mixed_batch(self, input: Tensor, adapter_names: list[str], y: Tensor) -> Tensor:
        if len(adapter_names) != len(input):
            raise ValueError(
                f"adapter_names must have one name for each row that reaches a layer, got {len(adapter_names)} names"
                f" for {len(input)} rows"
            )
        for name in dict.fromkeys(adapter_names):
            if name in self.mor_A:
                rows = [row for row, other in enumerate(adapter_names) if other == name]
                y[rows] += self._branch(name, input[rows]).to(y.dtype)
        return y

    def _branch(self, name: str, input: Tensor) -> Tensor:
        tensors, settings = self._adapter(name, input)
        return mor_branch(input, *tensors, **settings)

    def _adapter(self, name: str, input: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        config = self.mor_config[name]
        router: Any = self.mor_router[name] if config.router_outputs else None
        return call_arguments(input, self.mor_A[name], self.mor_B[name], router, config, training=self.training)

    def as_mor_linear(self) -> MoRLinear:
        """The same layer with its one active adapter as :func:`mor.inject` would make it, of the same parameters.

        Raises:
            ValueError: several adapters are active, or none is.
            TypeError: the base is none that :class:`mor.MoRLinear` takes.
        """
        if len(self.active_here) != 1 or self.disable_adapters:
            raise ValueError(
                f"one adapter must be active and enabled, got {', '.join(self.active_here) or 'none'}"
                f"{', disabled' if self.disable_adapters else ''}"
            )
        name = self.active_here[0]
        layer = MoRLinear(self.base_layer, self.mor_config[name])
        layer.mor_A, layer.mor_B = self.mor_A[name], self.mor_B[name]
        if layer.mor_router is not None:
            layer.mor_router = self.mor_router[name]  # type: ignore[assignment]
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: ranks={config.ranks}" for name, config in self.mor_config.items())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        raise NotImplementedError(CANNOT_MERGE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # peft asks layers only when it is about to convert, and would not say what to do instead.
        raise NotImplementedError(CANNOT_MERGE)


class MorModel(BaseTuner):
    """peft's tuner: puts adapters into a model, all of them or none."""

    prefix = "mor_"
    tuner_layer_cls = MorLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter of this name, with a copy of its settings; if that fails, the model is as it was.

        Raises:
            ValueError: the name of the adapter cannot be used.
        """
        _check_adapter_name(adapter_name)
        given = self.peft_config[adapter_name]
        self.peft_config[adapter_name] = copy.deepcopy(given)
        undo = _undo(self.model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self.peft_config[adapter_name] = given
            undo()
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # peft calls this before it changes anything, so here is the last chance to refuse.
        refuse_injected(self.model)
        refuse_distributed(self.model)
        with _bare(self.model):
            targets, excluded = _resolve(self.model, peft_config)
            linears = linear_names(self.model)
            # Only now is anything changed: hosts that read weights are made to call their layers.
            changes = prepare(self.model, [name for name in targets if name in linears])
            # On the model, because peft.inject_adapter_in_model gives that back, and throws the tuner away.
            self.model._mor_host_changes = (*getattr(self.model, "_mor_host_changes", ()), *changes)
        peft_config.target_modules = targets
        peft_config.exclude_modules = excluded
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # Names are full by now, and must not be taken for the end of another one.
        found = check_target_module_exists(peft_config, key)
        return key in peft_config.target_modules if found else found

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MorLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = MorLinear(target, adapter_name, peft_config)
        # peft replaces a module that hangs in several places in one of them only.
        replace_modules(self.model, {target: layer})
        self._replace_module(parent, target_name, layer, target)

    def unload(self) -> nn.Module:
        """The model with its original layers and hosts, all adapters removed."""
        # Before peft does: it visits a module in several places once, and hands every base its weight anew.
        replace_modules(self.model, {layer: layer.get_base_layer() for layer in _mor_layers(self.model)})
        restore(self.model, getattr(self.model, "_mor_host_changes", ()))
        self.model._mor_host_changes = ()
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter of this name."""
        super().delete_adapter(adapter_name)
        # peft leaves out every module with "mor_" in its full name, such as "tumor_encoder.fc".
        if left_out := [layer for layer in _mor_layers(self.model) if adapter_name in layer.mor_A]:
            for layer in left_out:
                layer.delete_adapter(adapter_name)
            self.set_adapter(self.active_adapters or left_out[0].active_adapters)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Within the context every adapted layer learns which adapter each row of the batch wants."""
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names must not be given in training mode; call model.eval() first")
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list with one name for each row, got {adapter_names!r}")
        known = {name for layer in _mor_layers(self.model) for name in layer.mor_A}
        if unknown := sorted(set(adapter_names) - known - {"__base__"}):
            raise ValueError(f"adapter_names must be adapters of the model or '__base__', got {', '.join(unknown)}")
        pass_on = partial(_pass_on, adapter_names=adapter_names)
        handles = [
            module.register_forward_pre_hook(pass_on, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (MorLinear, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_adapter_name(name: str) -> None:
    # Adapters are kept in these two under their names, and torch has no room there for some.
    taken = any(hasattr(container(), name) for container in (nn.ModuleDict, nn.ParameterDict))
    if not name or "." in name or taken:
        raise ValueError(
            "adapter_name must not be empty, have a dot, or be an attribute of torch's ModuleDict or ParameterDict,"
            f" got {name!r}; choose another name"
        )


def _undo(model: nn.Module) -> Callable[[], None]:
    """What brings the model back to how it is now, whatever part of an adapter has been added since."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    changes = getattr(model, "_mor_host_changes", ())
    layers = {layer: layer.adapters() for layer in _mor_layers(model)}

    def undo() -> None:
        added = [layer for layer in _mor_layers(model) if layer not in layers]
        replace_modules(model, {layer: layer.base_layer for layer in added})
        for layer, adapters in layers.items():
            layer.set_adapters(*adapters)
        with _bare(model):
            restore(model, getattr(model, "_mor_host_changes", ())[len(changes) :])
        if hasattr(model, "_mor_host_changes"):
            model._mor_host_changes = changes  # type: ignore[assignment]
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad = requires_grad

    return undo


def _pass_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _mor_layers(model: nn.Module) -> list[MorLinear]:
    return [module for module in model.modules() if isinstance(module, MorLinear)]


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Within the context the model has its original modules, under their own names, in place of peft's."""
    wrapped: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            wrapped[module] = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped[module] = module.original_module
    replace_modules(model, wrapped)
    try:
        yield
    finally:
        replace_modules(model, {original: wrapper for wrapper, original in wrapped.items()})


@contextmanager
def as_injected(peft_model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Within the context the model has its active adapter as :func:`mor.inject` would have put it in.

    Gives the model inside peft's, for :func:`mor.record_gates` and others, and patterns of the state-dict names of
    its ``modules_to_save``.

    Raises:
        ValueError, TypeError: see :meth:`MorLinear.as_mor_linear`; the model is left as it was.
    """
    model: Any = peft_model.base_model.model if isinstance(peft_model, peft.PeftModel) else peft_model
    layers: dict[nn.Module, nn.Module] = {}
    saved: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, MorLinear):
            layers[module] = module.as_mor_linear() if module.active_here else module.base_layer
        elif isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
            layers[module] = module.modules_to_save[module.active_adapters[0]]
            saved.append(f"{glob.escape(name)}.*")
    replace_modules(model, layers)
    try:
        yield model, saved
    finally:
        replace_modules(model, {layer: original for original, layer in layers.items()})


def check(peft_model: nn.Module, example: Any) -> None:
    """:func:`mor.check` for a model that peft wrapped: make sure that no layer's adapter is dead.

    Args:
        peft_model: With one active adapter; it is left as it was.
        example: Of the model inside: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ValueError: some adapters are dead (all of them are named), none or several are active, or the model gives
            values that are not finite.

    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), MorConfig(target_modules=["0"]))
    >>> check(model, torch.randn(2, 4))
    """
    if not _mor_layers(peft_model):
        raise ValueError("peft_model must have Mixture-of-Ranks layers, but has none; use get_peft_model first")
    with as_injected(peft_model) as (model, _):
        check_injected(model, example)


def _resolve(model: nn.Module, config: MorConfig) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Full names of the layers to adapt, and of the modules to leave alone, in the model's order.

    Raises:
        ValueError: a name matches nothing, or a layer that cannot be adapted; nothing in the model is changed.
    """
    modules, linears = dict(model.named_modules(remove_duplicate=False)), linear_names(model)
    names = _names(model)
    if not config.target_modules:
        raise ValueError(f"target_modules must say what to adapt, such as ['qkv', 'fc'], got {config.target_modules!r}")
    for name in config.modules_to_save or ():
        if not any(key.endswith(name) for key in modules):
            raise ValueError(f"modules_to_save '{name}' matches no module of the model")
    wanted = _match("target_modules", config.target_modules, model, config.layers_to_transform, config.layers_pattern)
    unwanted = _match("exclude_modules", config.exclude_modules or (), model)
    targets = tuple(name for name in names if name in wanted - unwanted and not _is_saved(name, config))
    if not targets:
        raise ValueError("target_modules must leave a layer to adapt after exclude_modules and modules_to_save")
    others = [name for name in targets if name not in linears]
    odd = [f"{name} ({type(modules[name]).__name__})" for name in others if not _is_linear(modules[name])]
    if odd:
        raise ValueError(
            f"target_modules must match linear layers only, but match {', '.join(odd)}; leave them out with"
            " exclude_modules"
        )
    if lazy := [name for name in targets if name in modules and _is_uninitialised(modules[name])]:
        raise ValueError(
            f"target_modules must match layers that have their weights, but {', '.join(lazy)} do not know their size"
            " yet; call the model once before"
        )
    if refused := refusals(model, [name for name in targets if name in linears]):
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"an adapter on these layers would do nothing: {listed}; leave them out with exclude_modules")
    return targets, tuple(name for name in names if name in unwanted) or None


def _names(model: nn.Module) -> list[str]:
    """Full names of all modules, and of the linear layers that :func:`mor.hosts.prepare` could make."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return list(dict.fromkeys([*modules, *linear_names(model)]))


def _match(
    field: str,
    wanted: Sequence[str] | str,
    model: nn.Module,
    layers: Sequence[int] | int | None = None,
    layers_pattern: Sequence[str] | str | None = None,
) -> set[str]:
    names = [name for name in _names(model) if name]
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            return _all_linear(model)
        if found := {name for name in names if re.fullmatch(wanted, name)}:
            return found
        wanted = [wanted]

    def in_layers(name: str) -> bool:
        # The layer's own name stands for any: what is asked is peft's reading of the number before it.
        rule = SimpleNamespace(
            target_modules=[name.rpartition(".")[2]], layers_to_transform=layers, layers_pattern=layers_pattern
        )
        # peft before 0.21 looks for the pattern behind a dot only, so not at the beginning of a name.
        return bool(check_target_module_exists(rule, f".{name}" if layers_pattern else name))

    def matching(target: str) -> set[str]:
        if target in names:
            return {target}
        chosen = None if layers_pattern else [layers] if isinstance(layers, int) else layers
        ends = [name for name in names if name.endswith(f".{target}")]
        problem = ""
        try:
            found = {name for name in resolve(model, [target], layers=chosen) if not layers_pattern or in_layers(name)}
        except ValueError as error:
            found = set(filter(in_layers, ends))
            argument, _, rest = str(error).partition(" ")
            in_peft = {"target": field, "layers": "layers_to_transform"}
            problem = f"{in_peft.get(argument, argument)} {rest}"
        if not found and (ends or not problem):
            by_pattern = f" by layers_pattern {layers_pattern!r}" if layers_pattern else ""
            problem = f"{field} '{target}' matches nothing in layers_to_transform {layers}{by_pattern}"
        if not found:
            raise ValueError(problem)
        return found

    return set().union(*map(matching, wanted))


def _all_linear(model: nn.Module) -> set[str]:
    """Names of all linear layers but the classifier, as transformers, timm, and classifiers on transformers have it."""
    heads = [getattr(model, name)() for name in ("get_output_embeddings", "get_classifier") if hasattr(model, name)]
    heads.append(getattr(model, "classifier", None))
    below_heads = {module for head in heads if isinstance(head, nn.Module) for module in head.modules()}
    in_heads = {name for name, module in model.named_modules(remove_duplicate=False) if module in below_heads}
    return {name for name in linear_names(model) if name and name not in in_heads}


def _is_saved(name: str, config: MorConfig) -> bool:
    """Whether the module is part of a module that peft copies and trains as a whole."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.modules_to_save or ())


def _is_linear(module: nn.Module) -> bool:
    # Quantised layers need not be nn.Linear, and are called, not looked into.
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _device_and_dtype(base: Any) -> tuple[torch.device | None, torch.dtype]:
    """Of what the layer keeps for a weight, if anything; some quantised layers (GPTQ) call it qweight."""
    weight = getattr(base, "weight", None)
    weight = getattr(base, "qweight", None) if weight is None else weight
    return (None, torch.float32) if weight is None else (weight.device, weight.dtype)


def _is_uninitialised(module: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(parameter) for parameter in module.parameters())


def _as_tuple(name: str, values: Any) -> Any:
    if values is None:
        return None
    if isinstance(values, str):
        try:
            re.compile(values)
        except re.error as error:
            raise ValueError(f"{name} must be a regular expression or a list, got {values!r}: {error}") from error
        return values
    names = tuple(values) if isinstance(values, Iterable) else (values,)
    if not all(isinstance(value, str) for value in names):
        raise TypeError(f"{name} must be a string or a list of strings, got {values!r}")
    return names


def _is_not_for_peft(config: MoRConfig) -> None:
    raise TypeError("peft takes mor.peft_plugin.MorConfig(target_modules=[...], ranks=..., ...), got mor.MoRConfig")


# The two names differ by one capital. These are what peft asks a config for first.
for _asked in ("base_model_name_or_path", "is_prompt_learning", "peft_type"):
    setattr(MoRConfig, _asked, property(_is_not_for_peft))


def _register() -> None:
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[METHOD_OF_PEFT])
    if known is None:
        register_peft_method(
            name=METHOD_OF_PEFT.lower(), config_cls=MorConfig, model_cls=MorModel, prefix=MorModel.prefix
        )
    elif known.__module__ != __name__:
        raise ImportError(f"peft has a method {METHOD_OF_PEFT} already, from {known.__module__}")


_register()
