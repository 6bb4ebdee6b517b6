"""SFusion: self-attention over the patches of all modalities weighs their maps, place by place.

Shapes: B batch, M modalities, P patches of a map, D width, G side of a map (P = G x G), C classes.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ei.baselines.fusion_model import FusionModel, require_divided
from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.output import Output


class SFusion(FusionModel):
    """``logits = head(mean over places of sum_m w_m F_m)``, w of :class:`MapFusion`, F the patch maps.

    The weight of a modality is the mean of w over places and channels.

    Raises:
        ValueError: the heads do not divide the width.

    Source: MICCAI 2023, arXiv 2208.12776, in two dimensions.
    """

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        require_divided(self.width, "sfusion_heads", settings.sfusion_heads)
        self.fusion = MapFusion(
            len(modalities),
            self.width,
            self.encoder(modalities[0]).backbone.grid,
            layers=settings.sfusion_layers,
            heads=settings.sfusion_heads,
            grid=settings.sfusion_grid,
            dropout=settings.sfusion_dropout,
        )
        self.head = nn.Linear(self.width, num_classes)

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)
        fused, weights = self.fusion(self.maps(batch), has)
        return Output(self.head(fused.mean((2, 3))), modality_weights=weights.mean((2, 3, 4)))


class MapFusion(nn.Module):
    """Maps pooled to ``grid`` x ``grid`` tokens, with sinusoidal positions, through a post-norm transformer; what comes
    out is brought back to the maps' side, and its softmax over the modalities that are there weighs them.

    Args:
        modalities: M.
        width: D.
        side: G; the way back is a pixel shuffle by G // grid, and what is left a resize.
        layers, heads, dropout: Of the transformer, whose MLPs are four times as wide.
        grid: Side that maps are pooled to.
    """

    positions: Tensor

    def __init__(
        self, modalities: int, width: int, side: int, *, layers: int, heads: int, grid: int, dropout: float
    ) -> None:
        super().__init__()
        self.side, self.grid = side, grid
        self.register_buffer("positions", sinusoids(modalities * grid**2, width), persistent=False)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        factor = max(1, side // grid)
        self.enlarge = nn.Sequential(
            nn.Conv2d(width, width * factor**2, 1, bias=False),
            nn.PixelShuffle(factor),
            nn.Upsample((side, side), mode="bilinear"),
        )

    def forward(self, maps: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, P, D), and (B, M) bool -> the fused map (B, D, G, G) and weights (B, M, D, G, G)."""
        count = maps.shape[:2]
        images = maps.mT.unflatten(-1, (self.side, self.side))  # (B, M, D, G, G)
        pooled = F.adaptive_avg_pool2d(images.flatten(0, 1), self.grid).unflatten(0, count)
        tokens = pooled.flatten(3).mT.flatten(1, 2)  # (B, M grid grid, D)
        absent = ~has.repeat_interleave(self.grid**2, dim=1)
        mixed = self.layers(self.dropout(tokens + self.positions), src_key_padding_mask=absent)
        each = mixed.unflatten(1, (count[1], -1)).mT.unflatten(-1, (self.grid, self.grid))
        scores = self.enlarge(each.flatten(0, 1)).unflatten(0, count)  # (B, M, D, G, G)
        weights = scores.masked_fill(~has[..., None, None, None], -math.inf).softmax(1)
        return (weights * images).sum(1), weights


def sinusoids(length: int, width: int) -> Tensor:
    """(length, width): sines and cosines of the position, in turns, from fast to slow.

    Source: arXiv 1706.03762, section 3.5.

    >>> [round(value, 4) for value in sinusoids(2, 4)[1].tolist()]
    [0.8415, 0.5403, 0.01, 0.9999]
    """
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
