"""Late fusion: a ViT and a head per modality, and four rules that make one prediction of theirs.

Each starts, as the paper's own late fusion does, from models of each modality alone. Logits are combined, not
probabilities, and the fused loss reaches everything.

Shapes: B batch, M modalities, C classes; a rule takes M summaries (B, D), M logits (B, C) and ``has`` (B, M) bool,
and gives logits (B, C) and weights (B, M) or None.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ei.config import BaselineConfig
from ei.models.backbone import Backbone
from ei.models.fusion import LateFusion


class Average(nn.Module):
    """``logits`` is the mean over the modalities that are there."""

    def forward(
        self, summaries: Sequence[Tensor], logits: Sequence[Tensor], has: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        weights = has / has.sum(1, keepdim=True)
        return _weighted(weights, logits), weights


class Weighted(nn.Module):
    """``logits = sum_m w_m logits_m``, w the softmax of one learned number per modality over those that are there."""

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(modalities))

    def forward(
        self, summaries: Sequence[Tensor], logits: Sequence[Tensor], has: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        weights = self.scores.expand_as(has).masked_fill(~has, -math.inf).softmax(1)
        return _weighted(weights, logits), weights


class Maximum(nn.Module):
    """Of each class the largest logit of the modalities that are there."""

    def forward(
        self, summaries: Sequence[Tensor], logits: Sequence[Tensor], has: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        each = torch.stack(list(logits), dim=1)
        return each.masked_fill(~has[..., None], -math.inf).amax(1), None


class Learned(nn.Module):
    """``logits = MLP([logits_1; ..; logits_M])``, those of absent modalities zero."""

    def __init__(self, modalities: int, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(modalities * num_classes, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(
        self, summaries: Sequence[Tensor], logits: Sequence[Tensor], has: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        each = torch.stack(list(logits), dim=1)
        return self.mlp((each * has[..., None]).flatten(1)), None


def _weighted(weights: Tensor, logits: Sequence[Tensor]) -> Tensor:
    return (weights[..., None] * torch.stack(list(logits), dim=1)).sum(1)


def late(rule: Callable[[int, int, BaselineConfig], nn.Module]) -> Callable[..., LateFusion]:
    """The late fusion by a rule, which is made for so many modalities and classes."""

    def build(
        modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> LateFusion:
        fusion = rule(len(modalities), num_classes, settings)
        return LateFusion({modality: fresh() for modality in modalities}, num_classes, fusion=fusion)

    return build
