"""Which modules a target means: roles such as "fc" inside transformer blocks, or patterns of full names.

The one place that knows how families of Vision Transformers name their layers.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

# Names relative to a block: timm's attn.qkv, attn.proj, mlp.fc1, mlp.fc2; open_clip's own mlp.c_fc, mlp.c_proj.
ROLES: dict[str, tuple[str, ...]] = {
    "qkv": (r"attn\.qkv",),
    "proj": (r"attn\.proj",),
    "fc": (r"mlp\.fc1", r"mlp\.fc2", r"mlp\.c_fc", r"mlp\.c_proj"),
    "fc1": (r"mlp\.fc1", r"mlp\.c_fc"),
    "fc2": (r"mlp\.fc2", r"mlp\.c_proj"),
}


def resolve(
    model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = (), layers: Iterable[int] | None = None
) -> list[str]:
    """Full names of the nn.Linear modules that ``targets`` mean, in the model's order.

    Args:
        model: Nothing in it is changed.
        targets: Roles (``ROLES``; looked for inside transformer blocks only), or fnmatch patterns that a full
            dotted name must match.
        exclude: The same, taken away again.
        layers: Numbers of the blocks to keep, counted from 0 in forward order; negative from the end.

    Raises:
        ValueError: a target or an exclusion matches nothing, a block does not exist, a matching layer is never
            called by its host, or nothing is left.
    """
    blocks = _blocks(model)
    chosen = None if layers is None else _choose(blocks, layers)
    linears: dict[str, str | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        block = _block_of(name, blocks)
        # The model itself has no parent in which it could be replaced.
        if name and isinstance(module, nn.Linear) and (chosen is None or block in chosen):
            linears[name] = block

    def matching(target: str, what: str) -> list[str]:
        found = [name for name, block in linears.items() if _matches(name, block, target)]
        if not found:
            raise ValueError(f"{what} '{target}' matches no nn.Linear{_in(layers)}; {_candidates(linears, target)}")
        return found

    wanted = {name for target in targets for name in matching(target, "target")}
    unwanted = {name for target in exclude for name in matching(target, "exclude")}
    names = [name for name in linears if name in wanted - unwanted]
    if not names:
        raise ValueError(f"nothing is left of targets {list(targets)} after exclude {list(exclude)}")
    dead = [name for name in names if _reads_weight_only(model, name)]
    if dead:
        raise ValueError(
            "these layers are read by their host without being called, so an adapter on them would do nothing:"
            f" {_listed(dead)}; leave them out with exclude=[...]"
        )
    return names


def _blocks(model: nn.Module) -> list[str]:
    """Names of the transformer blocks: modules with attention that stand in a list."""
    lists = [name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    return [
        f"{name}.{child}" if name else child
        for name in lists
        for child, block in model.get_submodule(name).named_children()
        if hasattr(block, "attn")
    ]


def _block_of(name: str, blocks: Iterable[str]) -> str | None:
    return next((block for block in blocks if name.startswith(block + ".")), None)


def _choose(blocks: list[str], layers: Iterable[int]) -> set[str | None]:
    wanted = list(layers)
    if not wanted:
        raise ValueError("layers must name at least one block, got none; leave it out to adapt all")
    missing = [layer for layer in wanted if not -len(blocks) <= layer < len(blocks)]
    if missing:
        raise ValueError(f"layers must be blocks of the model, which has {len(blocks)}, got {missing}")
    return {blocks[layer] for layer in wanted}


def _matches(name: str, block: str | None, target: str) -> bool:
    if target not in ROLES:
        return fnmatchcase(name, target)
    return block is not None and any(
        re.fullmatch(rf"(.*\.)?{suffix}", name.removeprefix(block + ".")) for suffix in ROLES[target]
    )


def _reads_weight_only(model: nn.Module, name: str) -> bool:
    """Hosts that compute with a layer's ``weight`` themselves: an adapter around the layer would be dead."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    separate_bias = getattr(parent, "q_bias", None) is not None and not getattr(parent, "qkv_bias_separate", False)
    # In evaluation, a TransformerEncoderLayer hands its weights to a kernel that knows no adapters.
    is_fast_path = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    return is_fast_path or (child == "qkv" and separate_bias)


def _in(layers: Iterable[int] | None) -> str:
    return "" if layers is None else " in the chosen layers"


def _candidates(linears: Iterable[str], target: str) -> str:
    names = [re.sub(r"\.\d+\.", ".*.", name) for name in linears]
    if not names:
        return "there is no nn.Linear at all"
    known = f"roles are {', '.join(ROLES)}, and names are {_listed(dict.fromkeys(names))}"
    if target in ROLES:
        return f"it is a role, for transformer blocks; elsewhere a pattern such as '*{target}*' may fit; {known}"
    return known


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
