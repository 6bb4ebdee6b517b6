"""RadDiag: a transformer over the images of each modality, and one over the modalities.

Shapes: B batch, M modalities, I images per modality, D width, C classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ei.baselines.fusion_model import FusionModel, require_divided
from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.output import Output


class RadDiag(FusionModel):
    """``logits = head(set([v_1 + e_1, .., v_M + e_M]))`` with ``v_m = set_of_images([f_m1, .., f_mI])``.

    Both sets are :class:`SetTransformer`, the first, which all modalities share, with positions; e are learned
    embeddings of the modalities; the head is Linear, GELU, Linear. The loss on key slices is not here.

    Raises:
        ValueError: there are more modalities than embeddings, or more images of one than positions, or the heads do not
            divide the width.

    Source: Nature Communications 15 (2024) 10147, arXiv 2312.16151.
    """

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        if len(modalities) > settings.raddiag_table:
            raise ValueError(
                f"raddiag_table must have a row for each of {len(modalities)} modalities, got {settings.raddiag_table}"
            )
        width = self.width
        require_divided(width, "raddiag_heads", settings.raddiag_heads)
        self.of_images = SetTransformer(width, layers=1, heads=1, positions=settings.raddiag_slices)
        self.embeddings = nn.Embedding(settings.raddiag_table, width)
        self.fusion = SetTransformer(width, settings.raddiag_layers, settings.raddiag_heads)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_classes))

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)
        volumes = [
            self.of_images(self.encoder(modality).by_image(batch), batch.present[modality])
            for modality in self.modalities
        ]
        told = torch.stack(volumes, dim=1) + self.embeddings.weight[: len(volumes)]
        return Output(self.head(self.fusion(told, has)))

    def parts(self) -> dict[str, list[nn.Module]]:
        return super().parts() | {"fusion": [self.of_images, self.embeddings, self.fusion]}


class SetTransformer(nn.Module):
    """A pre-norm transformer over a CLS token and what is there of a set; gives the CLS token.

    Args:
        width: D, also of the MLPs.
        layers, heads: Of the transformer.
        positions: Most items, if they have learned positions; 0: their order does not matter.
    """

    def __init__(self, width: int, layers: int, heads: int, positions: int = 0) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.positions = nn.Parameter(torch.empty(positions + 1, width).normal_(std=0.02)) if positions else None
        layer = nn.TransformerEncoderLayer(width, heads, width, dropout=0.0, norm_first=True, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        for parameter in self.layers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, items: Tensor, there: Tensor) -> Tensor:
        """(B, n, D), and (B, n) bool which are there -> (B, D).

        Raises:
            ValueError: there are more items than positions.
        """
        x = torch.cat([self.cls.expand(len(items), 1, -1), items], dim=1)
        if self.positions is not None:
            if x.shape[1] > len(self.positions):
                raise ValueError(
                    f"raddiag_slices must be at least the number of images of a modality, {items.shape[1]},"
                    f" got {len(self.positions) - 1}"
                )
            x = x + self.positions[: x.shape[1]]
        absent = torch.cat([there.new_zeros(len(there), 1), ~there], dim=1)
        return self.layers(x, src_key_padding_mask=absent)[:, 0]
