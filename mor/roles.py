"""Which modules a target means: roles such as "fc" inside transformer blocks, or patterns of full names.

The one place that knows how families of Vision Transformers name their layers.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from torch import nn

from mor.hosts import identity, linear_names, refusals

# What attentions and MLPs are called inside a block.
ATTENTION = (
    r"attn|attention|self_attn|self_attention|multihead_attn|temporal_attention|token_mixer|e_mhsa|xca"
    r"|factoratt_crpe\d?|attn_in|attn_out|attn_layer\.\d|msa|mhsa|mha"
)
MLP = r"mlp|mlp2|mlp_in|mlp_layer|ffn|feed_?forward|net|MLP|FFN"
# Inside a block they make biases of positions, or mix heads, and do not see tokens: "all" does not mean them.
NO_TOKENS = r"(?:.*\.)?(?:rel_pos|cpb_mlp|meta_mlp|\w*position_bias\w*|pos_proj|proj_[lw])(?:\..*)?"

# What the layers of a block are called, relative to the block. In front may stand what is neither an attention nor
# an MLP (``attn_block.attn.qkv``), so that an MLP inside an attention, which makes position biases, is no "fc".
PARTS: dict[str, tuple[str, ...]] = {
    "qkv": (
        "{attention}.(qkv|q|k|v|qk|kv)",  # timm; split: CaiT, XCiT, VOLO, Twins, PVTv2, ConViT, TNT
        "{attention}.(q|k|v)_proj",  # EVA-02; transformers 5; nn.MultiheadAttention with kdim or vdim
        "{attention}.in_proj",  # nn.MultiheadAttention, open_clip: no module until it is adapted
        "{attention}.[wW]_?(q|k|v|Q|K|V|qkv)",  # CrossViT; hand-written ones
        "({attention}|[0-9]).to_(qkv|q|k|v|kv|query|key)",  # torchvision MaxViT, SwiftFormer, vit-pytorch
        "{attention}.((self|attention).)?(query|key|value|qkv)",  # transformers 4, Swinv2, Data2Vec, VideoMAE
        "{attention}.(attention.)?projection_(query|key|value)",  # CvT
    ),
    "proj": (
        "{attention}.(proj|o_proj|out_proj|merge|projection|projection_layer)",
        "{attention}.[wW]_?(o|O)",
        "{attention}.output.dense",  # transformers 4
        "({attention}|[0-9]).to_out(.0)?",  # vit-pytorch
        "attn_out_proj",  # timm *_xp
    ),
    "fc1": (
        "{mlp}.(fc1|c_fc|lin1|dense1|w12|[01])",
        "{mlp}.(fc1_g|fc1_x|w0|w1|gate_proj|up_proj)",  # both factors of a gated MLP
        "{mlp}.ln1",  # LeViT
        "linear1",  # nn.TransformerEncoderLayer
        "intermediate.dense",  # transformers 4
    ),
    "fc2": (
        "{mlp}.(fc2|c_proj|lin2|dense2|w2|w3|down_proj|[2-4])",
        "{mlp}.ln2",
        "linear2",
        "output.dense",
        "mlp_out_proj",  # timm *_xp
    ),
}
# One matrix for several parts: it is in "all", and a role that means only one of them is refused.
PACKED: dict[str, tuple[str, ...]] = {
    "in_proj": ("qkv", "fc1"),  # timm *_xp, *_dpwee
    "out_proj": ("proj", "fc2"),  # timm *_dpwee
}
NO_BLOCKS = "no block has such a layer: blocks are elements of an nn.ModuleList or nn.Sequential, with an attention"
ROLES: dict[str, tuple[str, ...]] = {
    "qkv": ("qkv",),
    "proj": ("proj",),
    "fc": ("fc1", "fc2"),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
    "all": tuple(PARTS),
}


@dataclass(frozen=True)
class Selection:
    """What targets mean: the layers, and those in the same blocks that "all" should have meant and does not know."""

    names: list[str]
    without_role: list[str]


def resolve(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    layers: int | Iterable[int] | None = None,
) -> list[str]:
    """Full names of the linear layers that ``targets`` mean, in the model's order.

    A name may be one that :func:`mor.hosts.prepare` has yet to make a module, such as ``attn.in_proj`` of an
    nn.MultiheadAttention.

    Args:
        model: Nothing in it is changed.
        targets: Roles (``ROLES``; looked for inside transformer blocks only), or fnmatch patterns that a full
            dotted name must match. "all" warns of linear layers in a block that have no role.
        exclude: The same, taken away again.
        layers: Numbers of the blocks to keep, counted from 0 as they are registered; negative from the end.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a target or an exclusion matches nothing, a role is packed with another into one layer, a block
            does not exist, a host cannot be made to call a matching layer, or nothing is left.
    """
    selection = select(model, targets, exclude, layers)
    refused = refusals(model, selection.names)
    if refused:
        by_reason: dict[str, list[str]] = {}
        for name, reason in refused.items():
            by_reason.setdefault(reason, []).append(name)
        listed = "; ".join(f"{_listed(names)}: {reason}" for reason, names in by_reason.items())
        raise ValueError(f"an adapter on these layers would do nothing: {listed}; leave them out with exclude=[...]")
    if selection.without_role:
        patterns = _collapsed(selection.without_role)
        warnings.warn(
            f"the target 'all' leaves out {_listed(patterns)}, which have no known role; add them by name (targets="
            f"['all', '{patterns[0]}']), or name them in exclude",
            stacklevel=3,
        )
    return selection.names


def select(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    layers: int | Iterable[int] | None = None,
) -> Selection:
    """As :func:`resolve`, with the layers that a host cannot be made to call, and without a warning."""
    targets, exclude = as_strings("targets", targets), as_strings("exclude", exclude)
    if not targets:
        raise ValueError("targets must name at least one role or pattern, got none")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model itself is a linear layer, and has no place where it could be replaced; wrap it in a module,"
            " such as nn.Sequential(model)"
        )
    linears = linear_names(model)
    blocks = dict.fromkeys(find_blocks(model, linears))
    chosen = None if layers is None else _choose(list(blocks), _layer_numbers(layers))
    everywhere = _parts(model, linears, blocks)
    block_of = {name: _block_of(name, blocks) for name in linears}
    part_of = {name: part for name, part in everywhere.items() if chosen is None or block_of[name] in chosen}

    def matching(target: str, what: str) -> list[str]:
        # An exclusion that the choice of layers makes superfluous does no harm.
        among = part_of if what == "target" else everywhere
        found = [name for name, part in among.items() if _matches(name, part, target)]
        packed = _packed_with_others(among, target)
        if packed:
            raise ValueError(
                f"{what} '{target}' is packed with other roles into {_listed(_collapsed(packed))};"
                f" name it by the role 'all' or the pattern '*.{packed[0].rpartition('.')[2]}'"
            )
        if not found:
            where = "" if among is everywhere or layers is None else " in the chosen layers"
            raise ValueError(f"{what} '{target}' matches no nn.Linear{where}; {_candidates(model, among, target)}")
        return found

    wanted = {name for target in targets for name in matching(target, "target")}
    unwanted = {name for target in exclude for name in matching(target, "exclude")}
    names = [name for name in part_of if name in wanted - unwanted]
    excluded = {identity(model, name): name for name in unwanted}
    for name in names:
        if identity(model, name) in excluded:
            other = excluded[identity(model, name)]
            raise ValueError(f"{name} and {other} are the same layer, so either both can be adapted or none")
    if not names:
        raise ValueError(f"nothing is left of targets {list(targets)} after exclude {list(exclude)}")
    seen = {identity(model, name) for name in (*wanted, *unwanted)}
    without_role = [
        name
        for name, part in part_of.items()
        if "all" in targets and block_of[name] and not part and identity(model, name) not in seen
    ]
    return Selection(names, [name for name in without_role if not re.fullmatch(NO_TOKENS, name)])


def role_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The part of a block ("qkv", "proj", "fc1", "fc2", "qkv+fc1", ...) that each name is, "" if it is none."""
    linears = linear_names(model)
    part_of = _parts(model, linears, dict.fromkeys(find_blocks(model, linears)))
    roles = {}
    for name in names:
        part = part_of.get(name)
        roles[name] = "" if part is None else "+".join(PACKED.get(part, (part,)))
    return roles


def find_blocks(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """Names of the transformer blocks, in the model's order.

    Every family stacks its blocks in lists (nn.ModuleList, nn.Sequential), but so it does with stages, with the
    steps of an MLP, and with attentions that run in parallel. A block is the smallest element of a list that holds
    an attention, an MLP, and a layer with a role in one of them; what is inside a block is none, and what holds one
    is a stage. Where attention stands without an MLP, as in CrossViT's fusion, the smallest element around it is a
    block.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    elements = {
        f"{name}.{child}" if name else child: None
        for name, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module._modules
    }
    alias = _aliases(model)
    linears = [alias(name) for name in linears]
    named = [*map(alias, modules), *linears]
    attention = _elements_with(elements, named, _HOLDS_ATTENTION) & _elements_with(elements, linears, _ANY_ROLE)
    whole = _smallest(attention & _elements_with(elements, named, _HOLDS_MLP))
    stages = _enclosing(whole)
    alone = {element for element in attention - whole - stages if not _block_of(element, whole)}
    blocks = whole | _smallest(alone)
    return [element for element in elements if element in blocks]


def as_strings(name: str, values: Any) -> list[str]:
    """One string or several as a list."""
    listed = [values] if isinstance(values, str) else list(values) if isinstance(values, Iterable) else [values]
    if not all(isinstance(value, str) for value in listed):
        raise TypeError(f"{name} must be strings, got {values!r}")
    return listed


def _aliases(model: nn.Module) -> Callable[[str], str]:
    """A module's full name, with any nn.MultiheadAttention in it called "attn", whatever its name is."""
    attentions = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.MultiheadAttention)
    }

    def alias(name: str) -> str:
        inside = next((prefix for prefix in (name, *_enclosing([name])) if prefix in attentions), None)
        if inside is None:
            return name
        # An attention that is nothing but a wrapper of another is the same one.
        around = re.sub(rf"(?:(?:^|\.)(?:{ATTENTION}))+$", "", inside.rpartition(".")[0])
        return f"{around}.attn{name.removeprefix(inside)}".lstrip(".")

    return alias


def _parts(model: nn.Module, linears: Mapping[str, tuple[int, int]], blocks: Collection[str]) -> dict[str, str | None]:
    """The part of a block that each linear layer is; the model itself, which has no place in one, is left out."""
    alias = _aliases(model)
    parts: dict[str, str | None] = {}
    for name, (inputs, outputs) in linears.items():
        block = _block_of(name, blocks)
        parts[name] = None if block is None else _part(alias(name).removeprefix(block + "."))
        # The output of a gated MLP is w2 with some and w3 with others; the factor beside w1 has its shape.
        if parts[name] == "fc2" and inputs != outputs:
            first = re.sub(r"\bw[23]$", "w1", name)
            parts[name] = "fc1" if first != name and linears.get(first) == (inputs, outputs) else "fc2"
    return parts


def _compile(names: Iterable[str]) -> re.Pattern[str]:
    prefix = rf"(?:(?!(?:{ATTENTION}|{MLP})\.)[^.]+\.)*?"
    # Gemma 4 and LeViT wrap the matrix once more: q_proj.linear, proj.ln.linear.
    wrapper = r"(?:(?:\.ln)?\.linear)?"
    joined = "|".join(names).replace(".", r"\.")
    joined = joined.replace("{attention}", f"(?:{ATTENTION})").replace("{mlp}", f"(?:{MLP})")
    return re.compile(f"{prefix}(?:{joined}){wrapper}")


_PATTERNS = {part: _compile(names) for part, names in PARTS.items()}
_ANY_ROLE = _compile([*(name for names in PARTS.values() for name in names), *PACKED])
# From a list's element on, the name of an attention or an MLP, or of a layer with a role in one.
_HOLDS_ATTENTION = re.compile(
    rf"(?:.*\.)?(?:{ATTENTION})|" + _compile([*PARTS["qkv"], *PARTS["proj"], *PACKED]).pattern
)
_HOLDS_MLP = _compile(["{mlp}", *PARTS["fc1"], *PARTS["fc2"], *PACKED])


def _elements_with(elements: Collection[str], names: Iterable[str], pattern: re.Pattern[str]) -> set[str]:
    return {
        element
        for name in names
        for element in _enclosing([name])
        if element in elements and pattern.fullmatch(name.removeprefix(element + "."))
    }


def _smallest(elements: set[str]) -> set[str]:
    return elements - _enclosing(elements)


def _enclosing(names: Iterable[str]) -> set[str]:
    return {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts))}


def _block_of(name: str, blocks: Collection[str]) -> str | None:
    return next((prefix for prefix in _enclosing([name]) if prefix in blocks), None)


def _part(relative: str) -> str | None:
    if relative in PACKED:
        return relative
    return next((part for part, pattern in _PATTERNS.items() if pattern.fullmatch(relative)), None)


def _matches(name: str, part: str | None, target: str) -> bool:
    if target not in ROLES:
        return fnmatchcase(name, target)
    return part is not None and (part in ROLES[target] or (target == "all" and part in PACKED))


def _packed_with_others(part_of: Mapping[str, str | None], target: str) -> list[str]:
    wanted = set(ROLES.get(target, ()))
    return [name for name, part in part_of.items() if part in PACKED and wanted & {*PACKED[part]} and target != "all"]


def _layer_numbers(layers: Any) -> list[int]:
    numbers: Any = [layers] if isinstance(layers, Integral) else layers
    if isinstance(numbers, Iterable) and not isinstance(numbers, (str, bytes, Mapping)):
        numbers = list(numbers)
        if all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers):
            return [int(number) for number in numbers]
    raise TypeError(f"layers must be numbers of blocks, such as 0, [0, -1] or range(6), got {layers!r}")


def _choose(blocks: list[str], layers: Iterable[int]) -> set[str | None]:
    wanted = list(layers)
    if not wanted:
        raise ValueError("layers must name at least one block, got none; leave it out to adapt all")
    missing = [layer for layer in wanted if not -len(blocks) <= layer < len(blocks)]
    if missing:
        raise ValueError(f"layers must be blocks of the model, which has {len(blocks)}, got {missing}")
    return {blocks[layer] for layer in wanted}


def _candidates(model: nn.Module, part_of: Mapping[str, str | None], target: str) -> str:
    if not part_of:
        return "there is no nn.Linear at all" + _convolutions(model, target)
    known = f"roles are {', '.join(ROLES)}, and names are {_listed(_collapsed(part_of))}"
    if target in ROLES:
        found = dict.fromkeys("+".join(PACKED.get(part, (part,))) for part in part_of.values() if part)
        blocks = f"its blocks have {', '.join(found)}" if found else NO_BLOCKS
        known = f"{known} ({blocks}){_convolutions(model, target)}"
        examples = dict.fromkeys(_pattern(name) for name in part_of)
        patterns = ", ".join(f"'{pattern}'" for pattern in list(examples)[:3])
        return f"it is a role, for transformer blocks; elsewhere patterns fit, such as {patterns}; {known}"
    return known


def _pattern(name: str) -> str:
    """One that matches a layer, and is no role."""
    return f"*.{name.rpartition('.')[2]}" if "." in name else f"*{name}" if name in ROLES else name


def _convolutions(model: nn.Module, target: str) -> str:
    """Many hybrid models keep these names for 1 x 1 convolutions."""
    patterns = [_PATTERNS[part] for part in ROLES.get(target, ())]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    found = [name for name in names if any(re.fullmatch(rf".*?\b{p.pattern}", name) for p in patterns)]
    return f"; {_listed(_collapsed(found))} are convolutions, which are not adapted" if found else ""


def _collapsed(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(collapse(name) for name in names))


def collapse(name: str) -> str:
    """A name with its numbers replaced by stars.

    >>> collapse("layers.0.blocks.11.mlp.fc1")
    'layers.*.blocks.*.mlp.fc1'
    """
    return re.sub(r"(?<=[._])\d+(?=\.)|^\d+(?=\.)", "*", name)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
