"""CosCat: features side by side, pulled together by their cosine.

Shapes: B batch, M modalities, D width, C classes.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ei.baselines.fusion_model import FusionModel
from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.fusion import module_key
from ei.models.output import Output


class CosCat(FusionModel):
    """``logits = head([f_1; ..; f_M])``, a head for each modality besides, and the loss of :func:`cosine_distance`.

    Features of an absent modality are zeros. Neither the second stage of the authors, on uncertainty and metadata, nor
    their deeper heads are here: the paper's number of parameters leaves room for linear ones only.

    Source: Artificial Intelligence in Medicine 162 (2025) 103091. Not public, so a setting: the weight of the cosine.
    """

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        self.weight = settings.coscat_cosine
        self.head = nn.Linear(len(modalities) * self.width, num_classes)
        self.modality_heads = nn.ModuleDict(
            {module_key(modality): nn.Linear(self.width, num_classes) for modality in modalities}
        )

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)
        features = self.summaries(batch)  # (B, M, D)
        each = zip(self.modalities, features.unbind(1), strict=True)
        return Output(
            self.head(features.flatten(1)),
            modality_logits={name: self.modality_heads[module_key(name)](feature) for name, feature in each},
            penalties={"cosine": self.weight * cosine_distance(features, has)},
        )

    def parts(self) -> dict[str, list[nn.Module]]:
        vits: list[nn.Module] = [self.encoder(modality).backbone for modality in self.modalities]
        return {"ViTs": vits, "heads": [self.head, self.modality_heads]}


def cosine_distance(features: Tensor, has: Tensor) -> Tensor:
    """(B,): mean of 1 - cosine over the pairs of modalities that a sample has; 0 without a pair.

    Args:
        features: (B, M, D).
        has: (B, M) bool.

    >>> features = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [3.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    >>> cosine_distance(features, torch.tensor([[True, True], [True, True], [True, False]])).tolist()
    [1.0, 0.0, 0.0]
    """
    distances, pairs = [], []
    for one, other in combinations(range(features.shape[1]), 2):
        distances.append(1 - F.cosine_similarity(features[:, one], features[:, other], dim=-1))
        pairs.append(has[:, one] & has[:, other])
    both = torch.stack(pairs, dim=1)
    return (torch.stack(distances, dim=1) * both).sum(1) / both.sum(1).clamp_min(1)
