"""peft's folders, read and written without peft: ``adapter_model.safetensors`` and ``adapter_config.json``."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialise
from torch import Tensor

from mor.checkpoint import CONFIG as CONFIG_OF_MOR
from mor.checkpoint import CONFIG_OF_PEFT, FORMAT, METHOD_OF_PEFT, read_files, read_folder, write_folder
from mor.checkpoint import TENSORS as TENSORS_OF_MOR
from mor.config import MoRConfig
from mor.files import write_atomically

TENSORS, CARD = "adapter_model.safetensors", "README.md"
# peft wraps a model twice, and names everything from outside.
PREFIX = "base_model.model."

CARD_HEAD = "---\nlibrary_name: peft\n---\n"
HOW_TO_LOAD = """
## How to load

This is a Mixture-of-Ranks adapter. peft knows these once `mor.peft_plugin` is imported, which the package
mixture-of-ranks brings; without it, peft stops with `KeyError: 'MOR'`.

```python
import mor.peft_plugin
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder")
```
"""


def to_peft(directory: str | os.PathLike[str], peft_directory: str | os.PathLike[str]) -> None:
    """Write what :func:`mor.save` wrote as a folder of peft.

    Args:
        directory: A folder written by :func:`mor.save`. Its other parts, such as a head, become ``modules_to_save``.
            peft reads those as the ends of names, and the folder does not know the whole model: peft cannot load the
            result where another module with parameters has a name that ends alike.
        peft_directory: Made if need be; an adapter that is there is replaced, with its README.md.

    Raises:
        ValueError: the folder cannot be read, or holds parts that peft cannot hold: parameters of the model itself,
            or of a module that contains adapted layers, or whose name is the end of an adapted layer's; or files of
            others are where the new ones belong.
    """
    config, modules, extra, tensors = read_folder(Path(directory))
    description = {
        "peft_type": METHOD_OF_PEFT,
        **config.to_dict(),
        "target_modules": modules,
        "modules_to_save": modules_to_save(extra, modules) or None,
    }
    write_peft_folder(peft_directory, description, tensors, CARD_HEAD + HOW_TO_LOAD)


def from_peft(peft_directory: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Write a Mixture-of-Ranks adapter that peft saved as a folder for :func:`mor.load`.

    Args:
        peft_directory: Where ``save_pretrained`` of peft wrote to; for an adapter that is not called "default", the
            folder of its name in there.
        directory: Made if need be; an adapter that is there is replaced.

    Raises:
        ValueError: the folder is missing or damaged, or holds an adapter of another method; or files of others are
            where the new ones belong.
    """
    _refuse_others(Path(directory), {TENSORS_OF_MOR: _are_tensors_of_mor, CONFIG_OF_MOR: _is_config_of_mor})
    folder = Path(peft_directory)
    description, tensors = _read_peft_folder(folder)
    try:
        config = MoRConfig.from_dict({item.name: description[item.name] for item in fields(MoRConfig)})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_OF_PEFT} is damaged: {error}") from error
    modules = [name.removesuffix(".mor_A") for name in tensors if name.endswith(".mor_A")]
    adapter = {name for name in tensors for module in modules if name.startswith(f"{module}.mor_")}
    extra = [name for name in tensors if name not in adapter]
    write_folder(directory, config, modules, extra, tensors)


def modules_to_save(names: Iterable[str], adapted: Sequence[str], state: Iterable[str] = ()) -> list[str]:
    """The outermost modules that hold these parameters and buffers; peft saves modules, not tensors.

    Args:
        names: Of the parameters and buffers to save.
        adapted: Names of the layers with adapters.
        state: Names of all the model's parameters and buffers, as far as known.

    Raises:
        ValueError: peft would not save these modules, or others as well.

    >>> modules_to_save(["head.0.weight", "head.scale", "norm.bias"], adapted=["blocks.0.fc"])
    ['head', 'norm']
    """
    modules: list[str] = []
    for name in names:
        module = name.rpartition(".")[0]
        inside = [layer for layer in adapted if f"{layer}.".startswith(f"{module}.") or name.startswith(f"{layer}.")]
        if not module or inside:
            reason = f"belongs to {module}, which has adapted layers" if module else "belongs to the model itself"
            raise ValueError(f"peft saves modules as a whole and cannot hold '{name}', which {reason}")
        modules.append(module)
    kept = dict.fromkeys(modules)
    outermost = [module for module in kept if not any(module.startswith(f"{other}.") for other in kept)]
    _refuse_ambiguous(outermost, adapted, state)
    return outermost


def _refuse_ambiguous(modules: Sequence[str], adapted: Sequence[str], state: Iterable[str]) -> None:
    """peft takes every module whose name ends like one of these; only those without tensors do no harm."""
    plain = [name for name in state if not name.startswith(tuple(f"{layer}." for layer in adapted))]
    holders = {
        PREFIX + holder for name in (*plain, *(f"{layer}.weight" for layer in adapted)) for holder in _above(name)
    }
    holders |= set(_above(PREFIX))
    for module in modules:
        others = sorted(other for other in holders - {PREFIX + name for name in modules} if other.endswith(module))
        if others:
            raise ValueError(
                f"peft reads modules_to_save as the ends of names and cannot hold '{module}' alone, because"
                f" '{others[0].removeprefix(PREFIX)}' ends alike; leave it out of extra and save it by itself"
            )


def _above(name: str) -> list[str]:
    """
    >>> _above("head.0.weight")
    ['head', 'head.0']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def write_peft_folder(
    directory: str | os.PathLike[str], description: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str
) -> None:
    """The files of an adapter as peft reads them; ``tensors`` by their names in the plain model."""
    refuse_foreign_files(directory)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    payload = serialise({PREFIX + name: tensor for name, tensor in tensors.items()}, metadata={"format": "pt"})
    write_atomically(folder / TENSORS, payload)
    write_atomically(folder / CONFIG_OF_PEFT, (json.dumps(description, indent=2) + "\n").encode())
    write_atomically(folder / CARD, card.encode())


def refuse_foreign_files(directory: str | os.PathLike[str]) -> None:
    """Make sure that :func:`write_peft_folder` writes only over what it, or peft, has written.

    Raises:
        ValueError: the folder has a README.md that is no model card of peft's, or other files that are not peft's.
    """
    known = {TENSORS: _are_tensors_of_peft, CONFIG_OF_PEFT: _is_config_of_peft, CARD: _is_card}
    _refuse_others(Path(directory), known)


def _refuse_others(folder: Path, known: Mapping[str, Callable[[Path], bool]]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, but is a file")
    others = [name for name, is_known in known.items() if (folder / name).exists() and not is_known(folder / name)]
    if others:
        raise ValueError(
            f"{folder} has files that no adapter was saved with and that would be overwritten: {', '.join(others)};"
            " choose another folder, or move them away"
        )


def _are_tensors_of_peft(path: Path) -> bool:
    return any(name.startswith(PREFIX) for name in _header(path)[1])


def _are_tensors_of_mor(path: Path) -> bool:
    return _header(path)[0].get("format") == FORMAT


def _is_config_of_peft(path: Path) -> bool:
    return "peft_type" in _description(path)


def _is_config_of_mor(path: Path) -> bool:
    return _description(path).get("format") == FORMAT


def _is_card(path: Path) -> bool:
    card = path.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
    return head is not None and "\nlibrary_name: peft\n" in head[0]


def _header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Metadata and names of a file of tensors; nothing of one that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, list(file.keys())
    except SafetensorError:
        return {}, []


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return description if isinstance(description, dict) else {}


def add_note_to_card(folder: Path) -> None:
    """Say in the folder's README.md what has to be imported before peft can load a Mixture-of-Ranks adapter."""
    path = folder / CARD
    card = path.read_text(encoding="utf-8") if path.exists() else CARD_HEAD
    if "mor.peft_plugin" not in card:
        # Above whatever else the card says, but below its metadata.
        head = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
        end = head.end() if head else 0
        write_atomically(path, (card[:end] + HOW_TO_LOAD + card[end:]).encode())


def _read_peft_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json, and the tensors by their names in the plain model."""
    description, payload = read_files(folder / CONFIG_OF_PEFT, folder / TENSORS, "adapter of peft")
    method = description.get("peft_type") if isinstance(description, dict) else None
    if method != METHOD_OF_PEFT:
        raise ValueError(
            f"{folder} must hold a Mixture-of-Ranks adapter ({METHOD_OF_PEFT}), got peft's method {method}"
        )
    try:
        tensors = load_tensors(payload)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged: {error}") from error
    strangers = [name for name in tensors if not name.startswith(PREFIX)]
    if strangers:
        raise ValueError(f"{folder / TENSORS} must name everything '{PREFIX}...', got {strangers[0]}")
    return description, {name.removeprefix(PREFIX): tensor for name, tensor in sorted(tensors.items())}
