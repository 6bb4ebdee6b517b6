"""What several adapters read from a configuration, and how they make parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ei.config import ModelConfig
from ei.models.vit import Backbone


def single_rank(config: ModelConfig) -> int:
    """The one rank of an adapter that has no router; 4 if none is given.

    Raises:
        ValueError: there are several, or it is below 1.
    """
    ranks = config.ranks or (4,)
    if len(ranks) != 1:
        raise ValueError(f"ranks must be a single rank with adapter '{config.adapter}', got {ranks}; several are 'mor'")
    if ranks[0] < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    return ranks[0]


def chosen_blocks(backbone: Backbone, config: ModelConfig, default: Iterable[int]) -> list[int]:
    """Numbers of the blocks in ``config.blocks``, in order; if it is empty, ``default``.

    Raises:
        ValueError: the backbone has no such block.
    """
    blocks = sorted(config.blocks or default)
    if blocks[-1] >= backbone.depth:
        raise ValueError(f"blocks must be within the ViT's 0..{backbone.depth - 1}, got {blocks[-1]}")
    return blocks


def new_parameter(*shape: int, like: Tensor) -> nn.Parameter:
    """Zeros to be trained, on the device of ``like``; fp32, even if ``like`` is narrower."""
    return nn.Parameter(torch.zeros(*shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device))
