"""MM-MIL: the images of all modalities are one bag, and several heads attend to what counts in it.

Shapes: B batch, M modalities, S images of a sample, D width, H heads, C classes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ei.baselines.fusion_model import FusionModel
from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.output import Output


class MMMIL(FusionModel):
    """``logits`` is the mean over heads of ``head(z_j)``, z_j what head j of :class:`AttentionPooling` sees.

    The weight of a modality is the attention that its images get, mean over the heads.

    Source: arXiv 2109.12307, section 2. Not public, so settings: the number of heads and their width.
    """

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        self.fusion = AttentionPooling(self.width, settings.mil_heads, settings.mil_hidden)
        self.head = nn.Linear(self.width, num_classes)

    def forward(self, batch: Batch) -> Output:
        batch.has_each(self.modalities)
        present = [batch.present[modality] for modality in self.modalities]
        instances = torch.cat([self.encoder(modality).by_image(batch) for modality in self.modalities], dim=1)
        pooled, attention = self.fusion(instances, torch.cat(present, dim=1))
        each = attention.mean(1).split([marks.shape[1] for marks in present], dim=1)
        weights = torch.stack([part.sum(1) for part in each], dim=1)
        return Output(self.head(pooled).mean(1), modality_weights=weights)


class AttentionPooling(nn.Module):
    """``z_j = sum_i a_ij f_i`` with ``a_j = softmax_i(v_j^T tanh(V_j f_i))``, over the instances that are there.

    Source: arXiv 1802.04712, section 2.4, of which it has several heads.

    >>> pooled, attention = AttentionPooling(8, heads=2, hidden=4)(torch.zeros(1, 3, 8), torch.tensor([[True] * 3]))
    >>> tuple(pooled.shape), [round(value, 3) for value in attention[0, 0].tolist()]
    ((1, 2, 8), [0.333, 0.333, 0.333])
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, heads * hidden)
        # A bias of the scores would cancel in the softmax.
        self.score = nn.Parameter(torch.empty(heads, hidden).uniform_(-1, 1) / math.sqrt(hidden))

    def forward(self, instances: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D), and (B, S) bool with at least one True in every row -> (B, H, D) and attention (B, H, S)."""
        hidden = self.hidden(instances).tanh().unflatten(-1, self.score.shape)  # (B, S, H, hidden)
        scores = torch.einsum("bshk,hk->bhs", hidden, self.score).masked_fill(~there[:, None], -math.inf)
        attention = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return attention.to(instances.dtype) @ instances, attention
