"""Methods of huggingface/peft as they are there; the only file of this package that imports peft."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import mor
from ei.config import OF_PEFT, ModelConfig
from ei.models.vit import Backbone, near
from mor.hosts import prepare
from mor.roles import resolve, role_of


def method_of_peft(backbone: Backbone, config: ModelConfig) -> None:
    """Any method of peft's registry that works layer by layer, with its own defaults, on ``config.targets``.

    LN tuning goes to every LayerNorm of the ViT. (IA)^3 scales what the second layer of an MLP reads, and what other
    targets give.

    Raises:
        ImportError: peft is not installed.
        ValueError: peft has no such method, or it cannot be used so: it needs settings that have no default, or more
            than a layer's input, trains nothing, or changes the frozen weights themselves.
    """
    vit, name = backbone.vit, config.adapter.removeprefix(OF_PEFT)
    targets = _layer_norms(vit) if name == "ln_tuning" else resolve(vit, config.targets)
    prepare(vit, targets)  # an nn.MultiheadAttention reads its weights, and is made to call layers
    # On a copy first, to which a method may do what it likes: the tensors of the trunk hang in this one.
    trial = copy.deepcopy(vit)
    frozen = list(trial.parameters())
    _inject(trial, name, targets)
    if not any(parameter.numel() for parameter in mor.trainable_parameters(trial).values()):
        raise ValueError(f"adapter '{config.adapter}' would train nothing of the ViT")
    if not all(_equal(tensor, copied) for tensor, copied in zip(vit.parameters(), frozen, strict=True)):
        raise ValueError(f"adapter '{config.adapter}' changes the frozen weights themselves, which are shared here")
    with _in_one_sentence(name, planned=False):
        _pass_zeros(vit, trial, targets)
    _inject(vit, name, targets)


def _inject(vit: nn.Module, name: str, targets: list[str]) -> None:
    """Adapt the layers of these full names."""
    try:
        from peft import inject_adapter_in_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ModuleNotFoundError as error:
        raise ImportError(
            f"adapter '{OF_PEFT}{name}' needs '{error.name}', which comes with the extra 'peft': pip install"
            " 'mixture-of-ranks[ei,peft]'"
        ) from error
    configs = {kind.value.lower(): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in configs:
        raise ValueError(f"adapter must name a method of peft after '{OF_PEFT}', got '{name}'{near(name, configs)}")
    # Patterns of whole names: peft takes a name in a list for the end of one, and 'norm' would mean attn.norm, too.
    settings: dict[str, Any] = {"target_modules": _pattern(targets)}
    if name == "ia3":
        settings["feedforward_modules"] = _pattern(
            each for each, role in role_of(vit, targets).items() if role == "fc2"
        )
    planned = all(parameter.is_meta for parameter in vit.parameters())
    with _in_one_sentence(name, planned=planned), warnings.catch_warnings():
        # Said of every LayerNorm that is a subclass of torch's, as timm's are.
        warnings.filterwarnings("ignore", "Unsupported layer type .*LayerNorm")
        inject_adapter_in_model(configs[name](**settings), vit)


@torch.no_grad()
def _pass_zeros(plain: nn.Module, adapted: nn.Module, targets: Iterable[str]) -> None:
    """One row of zeros through each adapted layer: some methods are made for other inputs, and say so only then."""
    for target in targets:
        weight = plain.get_submodule(target).weight
        assert isinstance(weight, Tensor)
        # Without weights there is nothing to compute, and some methods look at values.
        if not weight.is_meta:
            adapted.get_submodule(target)(weight.new_zeros(1, weight.shape[-1]))


@contextmanager
def _in_one_sentence(name: str, *, planned: bool) -> Iterator[None]:
    """Whatever goes wrong with a method becomes a ValueError that names it.

    ``planned``: the model has no values yet, as every model has none when its settings are checked.
    """
    try:
        yield
    except Exception as error:  # each method has its own demands, and its own way to voice them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if planned and "meta" in reason:  # torch, of tensors without values
            reason = "it is made from the values of the weights"
        raise ValueError(f"adapter '{OF_PEFT}{name}' cannot be used here: {reason}") from error


def _layer_norms(vit: nn.Module) -> list[str]:
    return [name for name, module in vit.named_modules() if isinstance(module, nn.LayerNorm)]


def _pattern(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or torch.equal(one, other)
