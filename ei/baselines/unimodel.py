"""UniModel: one ViT sees the patches of all images of all modalities as one sequence.

Shapes: B batch, S images of a sample over all modalities, P patches, D width, C classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.fusion import at_least_two
from ei.models.output import Classifier, Output
from ei.models.unimodal import Encoder


class OneBackbone(Classifier):
    """``logits = head(cls)``: behind one CLS token the patches of every image that a sample has, with their positions.

    With ``unimodel_embeddings`` a learned vector per modality, zero at first, is added to its patches.

    Raises:
        ValueError: there are fewer than two modalities.

    Source: arXiv 2603.17514, section 4.2.
    """

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__()
        self.modalities = at_least_two(modalities)
        self.encoder = Encoder(fresh(), "+".join(modalities))
        width = self.encoder.backbone.width
        shape = (len(modalities), width)
        self.embeddings = nn.Embedding(*shape, _weight=torch.zeros(shape)) if settings.unimodel_embeddings else None
        self.head = nn.Linear(width, num_classes)

    def forward(self, batch: Batch) -> Output:
        batch.has_each(self.modalities)
        backbone = self.encoder.backbone
        images = torch.cat([batch.images[modality] for modality in self.modalities], dim=1)  # (B, S, 3, H, W)
        present = torch.cat([batch.present[modality] for modality in self.modalities], dim=1)
        counts = [batch.present[modality].shape[1] for modality in self.modalities]
        kinds = torch.arange(len(counts), device=present.device).repeat_interleave(
            torch.tensor(counts).to(present.device)
        )
        # Those that are there come first: the first of them brings the CLS token, and the others join it.
        order = present.int().argsort(dim=1, descending=True, stable=True)
        samples = torch.arange(len(order), device=order.device)[:, None]
        images, present, kinds = images[samples, order], present[samples, order], kinds[order]
        tokens = images.new_zeros(*present[:, 1:].shape, backbone.patches, backbone.width)
        if (others := present[:, 1:]).any():
            patches = backbone.patch_tokens(images[:, 1:][others])
            if self.embeddings is not None:
                patches = patches + self.embeddings(kinds[:, 1:][others])[:, None]
            tokens = tokens.to(patches.dtype).index_put((others,), patches)
        added = [] if self.embeddings is None else [self.embeddings(kinds[:, 0])[:, None]]
        mask = others.repeat_interleave(backbone.patches, dim=1)
        cls = backbone(images[:, 0], tokens.flatten(1, 2), None if mask.all() else mask, added=added)
        return Output(self.head(cls))

    def parts(self) -> dict[str, list[nn.Module]]:
        embeddings = [] if self.embeddings is None else [self.embeddings]
        return {"ViT": [self.encoder.backbone], "embeddings": [*embeddings], "heads": [self.head]}
