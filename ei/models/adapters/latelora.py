"""LateLoRA: LoRA on the queries and values of the later blocks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ei.config import ModelConfig
from ei.models.adapters.settings import chosen_blocks, new_parameter, single_rank
from ei.models.vit import Backbone
from mor.hosts import prepare
from mor.injection import replace_modules
from mor.roles import resolve


def latelora(backbone: Backbone, config: ModelConfig) -> None:
    """LoRA of rank 4 on q and v of ``config.blocks``, by default the second half (6..11 of ViT-B).

    The rank is what the parameter count of arXiv 2603.17514, Table 7, leaves; the method's own is 32, on SAM.

    Raises:
        ValueError: the backbone has no such block, or several ranks are given.

    Source: LateLoRA (MIDL 2025), its "standard" variant.
    """
    rank = single_rank(config)
    blocks = chosen_blocks(backbone, config, range(backbone.depth // 2, backbone.depth))
    names = resolve(backbone.vit, "qkv", layers=blocks)
    prepare(backbone.vit, names)  # an nn.MultiheadAttention reads its weight, and is made to call a layer
    layers = [backbone.vit.get_submodule(name) for name in names]
    replace_modules(backbone.vit, {layer: QVLoRA(layer, rank) for layer in layers})


class QVLoRA(nn.Module):
    """A fused projection ``base`` to q, k and v, and LoRA on two of them:

        q = W_q x + b_q + B_q A_q x,   k = W_k x + b_k,   v = W_v x + b_v + B_v A_v x

    The scaling is 1. B is zero at the start.

    >>> layer = QVLoRA(nn.Linear(8, 24), rank=2)
    >>> layer(torch.zeros(5, 8)).shape, sum(p.numel() for name, p in layer.named_parameters() if "lora" in name)
    (torch.Size([5, 24]), 64)
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        outputs, inputs = base.weight.shape
        self.lora_A = new_parameter(2, rank, inputs, like=base.weight)
        self.lora_B = new_parameter(2, outputs // 3, rank, like=base.weight)
        for matrix in self.lora_A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 3 D)."""
        q, k, v = self.base(x).chunk(3, dim=-1)
        to_q, to_v = (F.linear(F.linear(x, A), B) for A, B in zip(self.lora_A, self.lora_B, strict=True))
        return torch.cat([q + to_q, k, v + to_v], dim=-1)
