"""Early fusion: the features of all modalities side by side, and one MLP on them."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from ei.baselines.fusion_model import FusionModel
from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.output import Output


class EarlyFusion(FusionModel):
    """``logits = head(MLP([f_1; ..; f_M]))``, with ReLU after each hidden layer; an absent modality's f is zero.

    Concatenation of tokens instead of features is :class:`ei.baselines.unimodel.OneBackbone`.
    """

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        widths = [len(modalities) * self.width, *settings.early_hidden]
        layers = [nn.Sequential(nn.Linear(source, target), nn.ReLU()) for source, target in pairwise(widths)]
        self.fusion = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, batch: Batch) -> Output:
        batch.has_each(self.modalities)
        return Output(self.head(self.fusion(self.summaries(batch).flatten(1))))
