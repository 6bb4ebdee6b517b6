"""Mixture of Ranks, and what is a setting of it: LoRA, LoRAMoE, and Mixture of Ranks without a bypass."""

import mor
from ei.config import ModelConfig
from ei.models.adapters.settings import chosen_blocks, single_rank
from ei.models.vit import Backbone


def mixture_of_ranks(backbone: Backbone, config: ModelConfig) -> None:
    """Mixture-of-Ranks layers on ``config.targets`` of ``config.blocks``.

    'mor': ranks 2, 4, 8 and, as ``config.bypass`` says, a bypass; 'lora': one of rank 4 without; 'loramoe': three of
    rank 4 without (its balancing loss needs tasks to tell apart, and is left out).

    Raises:
        ValueError: ``config.ranks`` does not go with the adapter, a target matches nothing, or there is no such block.

    Source: arXiv 2603.17514, section 3.4; LoRAMoE: ACL 2024.
    """
    layers = chosen_blocks(backbone, config, ()) if config.blocks else None
    mor.inject(backbone.vit, config.targets, layers=layers, config=_settings(config))


def _settings(config: ModelConfig) -> mor.MoRConfig:
    ranks = config.ranks or {"mor": (2, 4, 8), "lora": (4,), "loramoe": (4, 4, 4)}[config.adapter]
    if config.adapter == "lora":
        single_rank(config)
    if config.adapter == "loramoe" and (len(ranks) < 2 or len(set(ranks)) != 1):
        raise ValueError(f"ranks must be two or more equal ones with adapter 'loramoe', got {ranks}")
    return mor.MoRConfig(
        ranks=ranks,
        alphas=config.alphas or None,
        bypass=config.bypass and config.adapter == "mor",
        dropout=config.dropout,
    )
