"""Methods by name: what a comparison of several changes in the configuration that all of them share. Imports no torch.

========================  =========================================================================================
``FUSION``                a value of ``model.fusion``, with the adapters of the shared configuration
``FUSION:ADAPTER``        the same, with a value of ``model.adapter`` or a name of :data:`VARIANTS`
``late:average``, ...     other names of ``late-average``, ``late-weighted``, ``late-max``, ``late-learned``
``uni:MODALITY``          the first stage's model of one modality alone, as another method of the comparison has it
``uni:MODALITY:ADAPTER``  the same, of a method with that adapter
``FILE.yaml``             sections as for ``--config``, on top of the shared configuration; called as the file
========================  =========================================================================================
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import yaml

from ei.config import Config, Fusion, ModelConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "mor-no-bypass": {"adapter": "mor", "bypass": False},
}
"""Adapters that are more than a value of ``model.adapter``."""

USUAL_ADAPTER = {
    "mm-mil": "full",
    "sfusion": "full",
    "coscat": "full",
    "raddiag": "full",
    "dynmm": "full",
    "mmrad": "frozen",
    "unimodel": "mor",
}
"""How the paper trains the backbone of its baselines (arXiv 2603.17514, Table 3); FUSION:ADAPTER overrules it."""

ALONE = "uni:"
_LATE = re.compile(r"late:(average|weighted|max|learned)(?=:|$)")
# What several methods can be compared on at all, and what the protocol draws for each of them.
_SHARED = {
    "data": ("manifest", "modalities", "labels", "classes", "allow_missing"),
    "train": ("seed", "bootstrap", "stage1_from"),
}
_OF_STAGE2 = {
    "model": (
        "fusion",
        "int_hidden",
        "int_from",
        "int_at",
        "aux_backbone",
        "aux_weights",
        "share_adapters",
        "detach_fusion",
    ),
    "train": ("aux_weight", "gate_weight", "gate_prior", "stage1_from", "bootstrap", "temperature", "report_images"),
}
_OF_AN_ADAPTER = ("targets", "ranks", "alphas", "bypass", "dropout", "blocks", "prompts", "scale_patches")


@dataclass(frozen=True)
class Method:
    """A name, and what it changes in the configuration that all methods of a comparison share."""

    name: str
    changes: dict[str, dict[str, Any]]
    modality: str | None = None
    """Not the whole model, but the first stage's of this modality."""

    @property
    def folder(self) -> str:
        """The name as that of a folder; different names have different ones.

        >>> Method("ei:lora", {}).folder, Method("a/b", {}).folder
        ('ei+lora', 'a%2Fb')
        """
        return quote(self.name, safe=" :").replace(":", "+")

    def applied(self, base: Config) -> Config:
        """The configuration of this method.

        A method with another adapter than ``base`` has that adapter's own defaults for targets, ranks and the like,
        unless it sets them. Shared settings that would change nothing for the method, such as
        ``int_hidden`` for late fusion, are left out.

        Raises:
            ValueError: a setting of the method does not exist or cannot be; the message names the method.

        >>> base = Config(model=ModelConfig(int_hidden=64, ranks=(1, 2)))
        >>> late = find_method("late:lora").applied(base).model
        >>> late.adapter, late.ranks, late.int_hidden
        ('lora', (), 384)
        """
        values = base.to_dict()
        adapter = self.changes.get("model", {}).get("adapter", base.model.adapter)
        if adapter != base.model.adapter:
            values["model"] |= {item.name: item.default for item in fields(ModelConfig) if item.name in _OF_AN_ADAPTER}
        for section, changed in self.changes.items():
            if section in values:
                values[section] |= changed
            else:
                values[section] = changed
        own = {name for changed in self.changes.values() for name in changed}
        try:
            return Config.without_idle(values, kept=own)
        except ValueError as error:
            raise ValueError(f"method '{self.name}': {error}") from error


def find_method(name: str, modalities: Sequence[str] = ()) -> Method:
    """The method of a name (see above); whether its settings can be shows when it is applied.

    ``modalities`` are those that there are, whose names may hold colons.

    Raises:
        ValueError: no adapter follows a colon, or a file cannot be read, sets what all methods share, or is called as
            another method is.

    >>> find_method("late:average:lora").changes
    {'model': {'fusion': 'late-average', 'adapter': 'lora'}}
    >>> find_method("uni:cfp:lora").modality, find_method("uni:a:b", ["a:b"]).modality
    ('cfp', 'a:b')
    """
    if name.endswith((".yaml", ".yml")):
        return _from_file(Path(name))
    if name.startswith(ALONE):
        rest = name.removeprefix(ALONE)
        known = [each for each in modalities if f"{rest}:".startswith(f"{each}:")]
        modality = max(known, key=len, default=rest.partition(":")[0])
        # Whatever the shared fusion is, it is of one that has a first stage.
        return Method(name, _changes(name, "late", rest.removeprefix(modality)), modality)
    fusion, colon, adapter = _LATE.sub(r"late-\1", name).partition(":")
    return Method(name, _changes(name, fusion, colon + adapter, USUAL_ADAPTER.get(fusion, "")))


def _changes(name: str, fusion: str, ending: str, usual: str = "") -> dict[str, dict[str, Any]]:
    """Of a fusion, and of the adapter that follows a colon, if one does."""
    if ending == ":":
        raise ValueError(f"method '{name}' must name an adapter after the colon, such as {name}lora")
    adapter = ending.removeprefix(":") or usual
    chosen = VARIANTS.get(adapter, {"adapter": adapter}) if adapter else {}
    return {"model": {"fusion": fusion, **chosen}}


def find_methods(names: Sequence[str], base: Config) -> list[Method]:
    """The methods of a comparison.

    Raises:
        ValueError: there is none, two are one, or one cannot be found or applied.
    """
    if not names:
        raise ValueError("methods must name at least one method, such as ei,late")
    methods = [find_method(name, base.data.modalities) for name in names]
    seen: dict[tuple[Config, str | None], str] = {}
    folders: set[str] = set()
    for method in methods:
        if [other.name for other in methods].count(method.name) > 1:
            raise ValueError(f"two methods are called '{method.name}'; leave one out, or rename its file")
        # Some disks do not tell upper from lower case.
        if method.folder.lower() in folders or method.folder.startswith("."):
            raise ValueError(f"methods must have names of their own, without a dot first, got '{method.name}'")
        folders.add(method.folder.lower())
        if method.modality is not None and method.modality not in base.data.modalities:
            known = ", ".join(base.data.modalities)
            raise ValueError(f"method '{method.name}': there is no modality '{method.modality}', there are {known}")
        same = seen.setdefault((method.applied(base), method.modality), method.name)
        if same != method.name:
            raise ValueError(f"methods '{same}' and '{method.name}' are the same; leave one out")
    return methods


def settings_of(config: Config, base: Config) -> dict[str, Any]:
    """What a configuration changes in another, by field.

    >>> settings_of(Config(model=ModelConfig(fusion="late")), Config())
    {'fusion': 'late'}
    """
    theirs = base.to_dict()
    return {
        name: value
        for section, values in config.to_dict().items()
        for name, value in values.items()
        if value != theirs[section][name]
    }


def stage1_key(config: Config) -> str:
    """Two configurations with the same key have the same first stage, to the last bit.

    Of the model's and the training's settings, those not known here to concern only the second stage count, so one that
    is new makes keys differ. Other sections are of fusions.

    >>> stage1_key(Config()) == stage1_key(Config(model=ModelConfig(fusion="late")))
    True
    """
    return json.dumps(stage1_settings(config), sort_keys=True)


def stage1_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The settings that count for the first stage, by section."""
    values = config.to_dict()
    return {
        section: {name: value for name, value in values[section].items() if name not in _OF_STAGE2.get(section, ())}
        for section in ("data", "model", "train")
    }


def _from_file(path: Path) -> Method:
    try:
        changes = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the method {path}: {' '.join(str(error).split())}") from error
    if not isinstance(changes, Mapping) or not all(isinstance(section, Mapping) for section in changes.values()):
        raise ValueError(f"the method {path} must hold sections (data, model, train) of 'name: value' lines")
    if _LATE.sub(r"late-\1", path.stem).partition(":")[0] in (*get_args(Fusion), ALONE.rstrip(":")):
        raise ValueError(f"the method {path} is called as another method, '{path.stem}'; rename the file")
    shared = [name for section, names in _SHARED.items() for name in names if name in changes.get(section, {})]
    if shared:
        raise ValueError(f"the method {path} sets {', '.join(shared)}, which all methods of a comparison share")
    return Method(path.stem, {section: dict(values) for section, values in changes.items()})
