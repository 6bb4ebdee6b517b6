"""Cross-attention: the patches of each modality look at those of the others.

Shapes: B batch, M modalities, P patches, E width of the attention, C classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ei.baselines.fusion_model import FusionModel, require_divided
from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.fusion import module_key
from ei.models.output import Output


class CrossAttention(FusionModel):
    """``logits = head(mean over t of mean over patches of LN(q_t + attention_t(q_t, others)))``.

    q_t are the patches of modality t after the final norm, through a linear layer of that modality. The mean is over
    the modalities that are there; one that has no other beside it keeps its q_t.

    Raises:
        ValueError: the heads do not divide the width.
    """

    fusion: nn.ModuleDict

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        width = settings.cross_width
        require_divided(width, "cross_heads", settings.cross_heads)
        self.projections = nn.ModuleDict({module_key(name): nn.Linear(self.width, width) for name in modalities})
        self.fusion = nn.ModuleDict({module_key(name): Looking(width, settings.cross_heads) for name in modalities})
        self.head = nn.Linear(width, num_classes)

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)
        tokens = self._tokens(batch)
        looked = [
            self.fusion[module_key(target)](*self._roles(index, tokens, has))[0].mean(1)
            for index, target in enumerate(self.modalities)
        ]
        weights = has / has.sum(1, keepdim=True)
        return Output(self.head((weights[..., None] * torch.stack(looked, dim=1)).sum(1)))

    @torch.no_grad()
    def attention(self, batch: Batch) -> dict[str, Tensor]:
        """Of each modality, where its patches look: (B, P, (M - 1) P), mean over heads; zero at what is not there."""
        has, tokens = batch.has_each(self.modalities), self._tokens(batch)
        return {
            target: self.fusion[module_key(target)](*self._roles(index, tokens, has), with_weights=True)[1]
            for index, target in enumerate(self.modalities)
        }

    def parts(self) -> dict[str, list[nn.Module]]:
        return super().parts() | {"fusion": [self.projections, self.fusion]}

    def _tokens(self, batch: Batch) -> Tensor:
        """(B, M, P, E)."""
        maps = self.maps(batch).unbind(1)
        each = zip(self.modalities, maps, strict=True)
        return torch.stack([self.projections[module_key(modality)](patches) for modality, patches in each], dim=1)

    @staticmethod
    def _roles(target: int, tokens: Tensor, has: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, P, E), keys (B, (M - 1) P, E), and which keys are there (B, (M - 1) P)."""
        others = [index for index in range(tokens.shape[1]) if index != target]
        there = has[:, others].repeat_interleave(tokens.shape[2], dim=1)
        return tokens[:, target], tokens[:, others].flatten(1, 2), there


class Looking(nn.Module):
    """``LN(q + attention(q, k, k))``; LN(q) for a sample without keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, queries: Tensor, keys: Tensor, there: Tensor, with_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, P, E), (B, n, E), (B, n) bool -> (B, P, E) and, if asked for, weights (B, P, n)."""
        some = there.any(1)
        # A softmax over nothing is not a number, so a sample without keys gets some, and drops what comes of it.
        attended, weights = self.attention(
            queries, keys, keys, key_padding_mask=~(there | ~some[:, None]), need_weights=with_weights
        )
        seen = some[:, None, None]
        return self.norm(queries + attended * seen), None if weights is None else weights * seen
