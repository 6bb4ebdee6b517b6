"""Adapters on disk: ``adapter.safetensors`` and a ``config.json`` that says what they belong to."""

import difflib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialise
from torch import Tensor, nn

from mor.config import MoRConfig
from mor.files import write_atomically
from mor.hosts import linear_names
from mor.injection import (
    adapted_names,
    eject,
    find_injection,
    inject_names,
    injection_of,
    mor_layers,
    refuse_moved,
    remember_extra,
    trainable_parameters,
)
from mor.inspection import refuse_adapted
from mor.roles import as_strings
from mor.wrappers import original

Model = TypeVar("Model", bound=nn.Module)

TENSORS, CONFIG = "adapter.safetensors", "config.json"
FORMAT, FORMAT_VERSION = "mixture-of-ranks", 1
CONFIG_OF_PEFT, METHOD_OF_PEFT = "adapter_config.json", "MOR"


def save(model: nn.Module, directory: str | os.PathLike[str], extra: str | Sequence[str] = ()) -> None:
    """Write the adapters of an injected model, and such other parts as ``extra`` names.

    Args:
        model: The module that :func:`mor.inject` was called on.
        directory: Made if need be; an adapter that is there is replaced.
        extra: fnmatch patterns of further state-dict names, e.g. ``"head.*"`` for a trained head. What was loaded
            so with the adapters is saved again in any case.

    Raises:
        ValueError: the model was not injected, is on the meta device, or a pattern matches nothing; or the directory
            is a file, or holds another library's config.json.
        TypeError: an argument is of another kind.

    Layers that were removed from the model since it was injected are not saved. Parameters that are trainable and not
    saved, such as a forgotten head, give a warning. The file's hash is part of config.json: a file that was damaged,
    exchanged or only half written is recognised by :func:`load`. Whether an adapter is later put on the same frozen
    weights is not checked. What ``fully_shard`` has sharded is gathered, so all processes have to call this, each with
    a directory of its own; it is loaded before sharding.
    """
    folder, injection = _as_folder(directory, "mor.save(model, directory)"), injection_of(model)
    plain = original(model)
    refuse_moved(plain, injection)
    extra_names, tensors = tensors_to_save(plain, extra)
    write_folder(folder, injection.config, adapted_names(plain, injection), extra_names, tensors)


def _gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor in whole; all processes have to ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Read what :func:`save` wrote into ``model``, in place: a plain one is injected first.

    As after :func:`mor.inject`, the adapters alone are trainable: to go on with a head that was saved as ``extra``,
    unfreeze it again. :func:`mor.eject` leaves what was loaded so as it is.

    Args:
        model: A model of the same architecture as the saved one, plain, or injected with the same settings.
        directory: A folder written by :func:`save`.

    Returns:
        The model itself.

    Raises:
        ValueError: the folder is missing, damaged or of another kind, or does not fit the model; missing,
            unexpected and mismatched names come in one message, and the model is left as it was.
        TypeError: an argument is of another kind, or a layer to adapt is none that :class:`mor.MoRLinear` takes.
    """
    plain, folder = original(model), _as_folder(directory, "mor.load(model, directory)")
    config, modules, extra, tensors = read_folder(folder)
    injected = find_injection(plain)
    present = [] if injected is None else adapted_names(plain, injected)
    if injected is not None and (injected.config, set(present)) != (config, set(modules)):
        raise ValueError(
            f"the adapter in {folder} was made with {config} on {len(modules)} layers, but the model has"
            f" {injected.config} on {len(present)}; call mor.eject on it first"
        )
    if injected is None:
        refuse_adapted(plain)
        linears = linear_names(plain)
        absent = [name for name in modules if name not in linears]
        if absent:
            raise ValueError(f"the adapter in {folder} does not fit the model, which lacks the layers {_few(absent)}")
        inject_names(plain, modules, config)
    try:
        _copy(plain, tensors, extra, folder)
    except BaseException:
        if injected is None:
            eject(plain)
        raise
    remember_extra(plain, extra)
    return model


def tensors_to_save(
    model: nn.Module, extra: str | Sequence[str], *, stacklevel: int = 3
) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the parts that ``extra`` means or that were loaded, and copies of these and the adapters on the CPU.

    Parameters that are trainable and not among them give a warning, with ``stacklevel`` as in :func:`warnings.warn`.
    """
    model = original(model)
    state, injection = model.state_dict(), find_injection(model)
    adapter = _adapter_names(model)
    loaded = set() if injection is None else set(injection.extra)
    matched = _match_extra(state, adapter, as_strings("extra", extra))
    extra_names = [name for name in state if name in loaded or name in matched]
    saved = [*adapter, *extra_names]
    if any(state[name].is_meta for name in saved):
        raise ValueError("model must hold its weights to be saved, but it is on the meta device")
    if quantised := [name for name in saved if _is_quantised(state[name])]:
        raise ValueError(f"extra must name plain tensors, but these are quantised: {_few(quantised)}; leave them out")
    if left_out := sorted(set(trainable_parameters(model)) - set(saved)):
        warnings.warn(f"trainable but not saved: {_few(left_out)}; name them with extra=", stacklevel=stacklevel)
    return extra_names, {name: portable(state[name]) for name in saved}


def _is_quantised(tensor: Tensor) -> bool:
    """Whether it is made of several tensors (torchao's are), for which the file has no place; sharded ones are not."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor")


def portable(tensor: Tensor) -> Tensor:
    """A copy as files want it: the format has no notion of devices, strides, or tensors that share memory."""
    return _gathered(tensor).cpu().clone(memory_format=torch.contiguous_format)


def write_folder(
    directory: str | os.PathLike[str],
    config: MoRConfig,
    modules: Sequence[str],
    extra: Sequence[str],
    tensors: Mapping[str, Tensor],
) -> None:
    """The two files of an adapter; ``tensors`` are :func:`portable`."""
    folder = Path(directory)
    _refuse_foreign(folder)
    payload = serialise(dict(tensors), metadata={"format": FORMAT})
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mor": config.to_dict(),
        "modules": list(modules),
        "extra": list(extra),
        "sha256": hashlib.sha256(payload).hexdigest(),
        "torch": torch.__version__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS, payload)
    write_atomically(folder / CONFIG, (json.dumps(description, indent=2) + "\n").encode())


def _as_folder(directory: Any, call: str) -> Path:
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory must be a path, got {type(directory).__name__}; it is {call}")
    return Path(directory)


def _refuse_foreign(folder: Path) -> None:
    """Another library's folder keeps its config.json, without which what it describes is lost."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"directory must be a folder, but {folder} is a file")
    if not (folder / CONFIG).exists():
        return
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        description = None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} is not of this package and would be overwritten; give the adapter a folder of its own"
        )


def _copy(model: nn.Module, tensors: Mapping[str, Tensor], extra: Sequence[str], folder: Path) -> None:
    state = model.state_dict(keep_vars=True)
    expected = {*_adapter_names(model), *extra}
    problems = {
        "missing in the file": sorted(expected - set(tensors)),
        "unexpected in the file": sorted(set(tensors) - expected),
        "not in the model": sorted(expected - set(state)),
        "of another shape": [
            f"{name} (file {tuple(tensor.shape)}, model {tuple(state[name].shape)})"
            for name, tensor in tensors.items()
            if name in state and state[name].shape != tensor.shape
        ],
        "sharded, and only to be loaded before that": [
            name for name in tensors if name in state and hasattr(state[name], "full_tensor")
        ],
        "on the meta device": [name for name in tensors if name in state and state[name].is_meta],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_few(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the adapter in {folder} does not fit the model: {listed}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _adapter_names(model: nn.Module) -> list[str]:
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in mor_layers(model).items()
        for name in layer.adapter_parameters()
    ]


def _match_extra(state: Mapping[str, Any], adapter: Sequence[str], patterns: Sequence[str]) -> list[str]:
    of_adapters = set(adapter)
    others = [name for name in state if name not in of_adapters]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in others):
            raise ValueError(f"extra '{pattern}' matches nothing in the model's state; {_meant(pattern, others)}")
    return [name for name in others if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _meant(pattern: str, names: Sequence[str]) -> str:
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"did you mean '{pattern}.*'?"
    close = difflib.get_close_matches(pattern, names, cutoff=0.5)
    # What is saved besides adapters is a head, as a rule, and heads come last.
    heads = [name for name in names if re.search(r"head|classif|(^|\.)fc\.", name)]
    return f"names are {_few(list(dict.fromkeys([*close, *heads, *reversed(names)])))}"


def read_files(config: Path, tensors: Path, what: str) -> tuple[Any, bytes]:
    """The two files of an adapter: what its JSON says, and the other's bytes; a ValueError names what is missing."""
    try:
        return json.loads(config.read_text(encoding="utf-8")), tensors.read_bytes()
    except OSError as error:
        raise ValueError(f"{config.parent} holds no {what}: {error.strerror or error}: {error.filename}") from error
    except ValueError as error:
        raise ValueError(f"{config} is damaged: {error}") from error


def read_folder(folder: Path) -> tuple[MoRConfig, list[str], list[str], dict[str, Tensor]]:
    """What :func:`write_folder` wrote: settings, adapted layers, names of other parts, tensors."""
    _refuse_folder_of_peft(folder)
    description, payload = read_files(folder / CONFIG, folder / TENSORS, "adapter")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG} does not describe a {FORMAT} adapter")
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has format version {description.get('format_version')}, this package reads"
            f" {FORMAT_VERSION}; a newer mixture-of-ranks may read it"
        )
    if hashlib.sha256(payload).hexdigest() != description.get("sha256"):
        raise ValueError(f"{folder / TENSORS} is damaged, or not the file that {CONFIG} was written with")
    if absent := [key for key in ("mor", "modules", "extra") if key not in description]:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(map(repr, absent))}")
    try:
        return (
            MoRConfig.from_dict(description["mor"]),
            [str(name) for name in description["modules"]],
            [str(name) for name in description["extra"]],
            dict(sorted(load_tensors(payload).items())),
        )
    except (TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} is damaged: {error}") from error


def _refuse_folder_of_peft(folder: Path) -> None:
    if (folder / CONFIG).exists() or not (folder / CONFIG_OF_PEFT).exists():
        return
    try:
        method = json.loads((folder / CONFIG_OF_PEFT).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_OF_PEFT} is damaged: {error}") from error
    if method != METHOD_OF_PEFT:
        raise ValueError(f"{folder} holds an adapter of peft's method {method}, which peft alone can load")
    raise ValueError(
        f"{folder} was written by peft: mor.peft_format.from_peft(folder, new_folder) converts it for mor.load; or load"
        " it with peft, after `import mor.peft_plugin`"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
