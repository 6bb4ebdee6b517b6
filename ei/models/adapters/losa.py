"""LoSA: a small network beside the frozen backbone, which reads its blocks and sends no gradient into it.

Shapes: N images, T tokens, D width, r rank.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ei.config import ModelConfig
from ei.models.adapters.settings import chosen_blocks, single_rank
from ei.models.vit import Backbone


def losa(backbone: Backbone, config: ModelConfig) -> None:
    """A low-rank mixer after each of ``config.blocks``, by default every second and the last.

    There is no public code; which blocks are read is not published either. Six mixers of rank 4 on ViT-B give the
    number of parameters that arXiv 2603.17514, Table 7, prints.

    Source: arXiv 2402.02887, section 3.
    """
    blocks = chosen_blocks(backbone, config, range(backbone.depth - 1, -1, -2))
    like = next(backbone.vit.parameters())
    backbone.side = SideNetwork(backbone.width, backbone.token_count(), blocks, single_rank(config)).to(like.device)


class SideNetwork(nn.Module):
    """What is added to the backbone's tokens, from b_i after each tapped block i:

        u = b_i + y,   t = token_mlp_i(LN(u)^T)^T,   y <- y + t + channel_mlp_i(LN(u + t))

    y begins as 0, and the result is the last block's output plus y, so that the last u is what the paper's side
    network gives. The second layer of each MLP begins as 0: at the start the features are the frozen ones.

    Args:
        width: D.
        tokens: T; the network works for images of this many tokens only.
        blocks: Numbers of the tapped blocks, from 0.
        rank: r.

    >>> side = SideNetwork(width=8, tokens=5, blocks=[1], rank=2)
    >>> side(1, torch.ones(3, 5, 8), None).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, tokens: int, blocks: Iterable[int], rank: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleDict({str(block): LowRankMixer(width, tokens, rank) for block in blocks})

    def forward(self, index: int, x: Tensor, change: Tensor | None) -> Tensor | None:
        """y after block ``index``, whose output is x: (N, T, D), None while no block was tapped."""
        if str(index) not in self.mixers:
            return change
        return self.mixers[str(index)](x, torch.zeros_like(x) if change is None else change)


class LowRankMixer(nn.Module):
    """One step of :class:`SideNetwork`."""

    def __init__(self, width: int, tokens: int, rank: int) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mlp, self.channel_mlp = _mlp(tokens, rank), _mlp(width, rank)

    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        change = change + self.token_mlp(self.token_norm(x + change).transpose(1, 2)).transpose(1, 2)
        return change + self.channel_mlp(self.channel_norm(x + change))


def _mlp(features: int, rank: int) -> nn.Sequential:
    last = nn.Linear(rank, features)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(features, rank), nn.GELU(), last)
