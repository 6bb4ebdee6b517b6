"""DynMM: a gate chooses, sample by sample, among experts of one modality and one of all.

Shapes: B batch, M modalities, D width, C classes.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ei.baselines.fusion_model import FusionModel
from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.fusion import branch_of, branches
from ei.models.output import Output


class DynMM(FusionModel):
    """``logits = sum_b g_b logits_b``: M experts of one modality each, and one with ViTs of its own for all of them.

    The last has ``head([f_1; ..; f_M])``, and the gate reads the same features: ``g = softmax(MLP([f_1; ..; f_M]) /
    t)`` over the experts that a sample has the modality of. The loss ``cost * g_{M+1}`` keeps it from always taking the
    costly one. All experts are computed, also where the choice is hard.

    Source: CVPR workshops 2023, arXiv 2204.00102. Left open, so settings: the gate's width, and how the experts learn
    (here together with the gate; the authors take experts that are trained).
    """

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        self.settings = settings
        joined = len(modalities) * self.width
        self.head = nn.Linear(joined, num_classes)
        self.experts = branches({modality: fresh() for modality in modalities}, num_classes)
        self.fusion = nn.Sequential(
            nn.Linear(joined, settings.dynmm_hidden),
            nn.ReLU(),
            nn.Linear(settings.dynmm_hidden, len(modalities) + 1),
        )

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)
        joined = self.summaries(batch).flatten(1)  # (B, M D)
        alone = {}
        for modality in self.modalities:
            expert = branch_of(self.experts, modality)
            alone[modality] = expert.head(expert.summaries(batch)[0])
        usable = torch.cat([has, torch.ones_like(has[:, :1])], dim=1)
        gate = choice(self.fusion(joined) / self.settings.dynmm_temperature, usable, hard=self.settings.dynmm_hard)
        each = torch.stack([*alone.values(), self.head(joined)], dim=1)  # (B, M + 1, C)
        return Output(
            (gate[..., None] * each).sum(1),
            modality_logits=alone if self.settings.dynmm_experts else {},
            penalties={"cost": self.settings.dynmm_cost * gate[:, -1]},
        )

    def parts(self) -> dict[str, list[nn.Module]]:
        experts = [branch_of(self.experts, modality) for modality in self.modalities]
        shared = super().parts()
        return {
            "ViTs": shared["ViTs"],
            "ViTs of one modality": [expert.backbone for expert in experts],
            "heads": [self.head, *(expert.head for expert in experts)],
            "fusion": shared["fusion"],
        }


def choice(scores: Tensor, usable: Tensor, *, hard: bool) -> Tensor:
    """Softmax over what is usable; ``hard``: one-hot at its largest, with the gradient of the softmax.

    Args:
        scores: (B, n).
        usable: (B, n) bool.

    >>> scores, usable = torch.tensor([[0.0, 2.0, 5.0]]), torch.tensor([[True, True, False]])
    >>> [round(g, 2) for g in choice(scores, usable, hard=False)[0].tolist()]
    [0.12, 0.88, 0.0]
    >>> choice(scores, usable, hard=True).tolist()
    [[0.0, 1.0, 0.0]]
    """
    scores = scores.masked_fill(~usable, -math.inf)
    soft = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if not hard:
        return soft
    taken = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return taken + (soft - soft.detach())
