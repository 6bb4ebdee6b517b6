"""Joint embedding: all modalities in one space, in which a patient's images lie together.

Shapes: B batch, M modalities, E width of the space, C classes; Q queries, G items of a gallery.
"""

import math
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


class JointEmbedding(FusionModel):
    """``logits = head(sqrt(E) mean_m u_m)`` with ``u_m = project_m(f_m)`` of length 1, over the m that a sample has.

    The loss of each pair of modalities is :func:`contrastive_loss`, mean over the pairs that a sample has. Negatives
    are the other samples that go through the model at once: ``micro_batch`` and several processes make them fewer.
    sqrt(E) gives the head numbers of about 1, without which it would learn slowly.

    The classifier is linear. Without one, :func:`class_prototypes` of the training rows and :func:`zero_shot` classify
    what :meth:`embed` gives, and :func:`retrieve` finds a patient's image of one modality by that of another.

    Source: arXiv 2103.00020, section 2.3.
    """

    fusion: nn.ModuleDict

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        self.weight = settings.joint_weight
        width = settings.joint_width
        self.fusion = nn.ModuleDict({module_key(name): nn.Linear(self.width, width) for name in modalities})
        self.temperature = Temperature(settings.joint_temperature)
        self.head = nn.Linear(width, num_classes)

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)
        units = self.embed(batch)
        mean = (units * has[..., None]).sum(1) / has.sum(1, keepdim=True)
        scale = self.temperature()
        losses, pairs = [], []
        for one, other in combinations(range(len(self.modalities)), 2):
            pairs.append(has[:, one] & has[:, other])
            losses.append(contrastive_loss(units[:, one], units[:, other], scale, pairs[-1]))
        count = torch.stack(pairs).sum(0).clamp_min(1)
        return Output(
            self.head(math.sqrt(mean.shape[1]) * mean),
            penalties={"contrastive": self.weight * torch.stack(losses).sum(0) / count},
        )

    def embed(self, batch: Batch) -> Tensor:
        """(B, M, E), each of length 1; that of a modality which a sample lacks says nothing."""
        each = zip(self.modalities, self.summaries(batch).unbind(1), strict=True)
        projected = [self.fusion[module_key(modality)](feature) for modality, feature in each]
        stacked = torch.stack(projected, dim=1)
        return F.normalize(stacked.to(torch.promote_types(stacked.dtype, torch.float32)), dim=-1)

    def parts(self) -> dict[str, list[nn.Module]]:
        return super().parts() | {"fusion": [self.fusion, self.temperature]}


class Temperature(nn.Module):
    """A learned factor 1 / t on similarities, at most 100.

    Source: arXiv 2103.00020, section 2.4.

    >>> round(Temperature(0.07)().item(), 4)
    14.2857
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(start)))

    def forward(self) -> Tensor:
        return self.log_scale.clamp(max=math.log(100)).exp()


def contrastive_loss(one: Tensor, other: Tensor, scale: Tensor | float, there: Tensor | None = None) -> Tensor:
    """(B,): how hard it is to tell a sample's partner among those of all samples, in both directions.

    ``l_i = (CE_j(scale one_i . other_j, i) + CE_j(scale other_i . one_j, i)) / 2``, which is ln B where all
    similarities are equal. Its mean is open_clip's ClipLoss.

    Args:
        one, other: (B, E), of length 1.
        scale: What similarities are multiplied by.
        there: (B,) bool, the samples that have both; the others are nobody's negatives, and cost 0. None: all.

    Source: arXiv 2103.00020, figure 3.

    >>> [round(value, 4) for value in contrastive_loss(torch.eye(4)[:2], torch.eye(4)[2:], 14.3).tolist()]
    [0.6931, 0.6931]
    """
    rows = torch.arange(len(one), device=one.device) if there is None else there.nonzero()[:, 0]
    with torch.autocast(one.device.type, enabled=False):
        similarity = scale * one[rows] @ other[rows].mT
        # Cross-entropy, written out: it would refuse a batch in which nobody has both.
        forth, back = similarity.log_softmax(1).diagonal(), similarity.log_softmax(0).diagonal()
        return torch.zeros_like(one[:, 0]).index_put((rows,), -(forth + back) / 2)


def retrieve(query: Tensor, gallery: Tensor, k: int) -> Tensor:
    """(Q, k): the items of the gallery that are nearest to each query by cosine, the nearest first.

    Args:
        query: (Q, E).
        gallery: (G, E).
        k: At most G.

    Raises:
        ValueError: there are not so many items.

    >>> retrieve(torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]), k=2).tolist()
    [[1, 2]]
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k must be between 1 and the {len(gallery)} items of the gallery, got {k}")
    return (F.normalize(query, dim=-1) @ F.normalize(gallery, dim=-1).mT).topk(k, dim=-1).indices


def recall_at_k(query: Tensor, gallery: Tensor, k: int) -> float:
    """Share of the queries whose own item, that of the same row, is among the k nearest.

    >>> recall_at_k(torch.eye(3), torch.eye(3), k=1)
    1.0
    """
    own = torch.arange(len(query), device=query.device)[:, None]
    return float((retrieve(query, gallery, k) == own).any(1).float().mean())


def class_prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, E): of each class the mean embedding of its samples, of length 1.

    Args:
        embeddings: (N, E).
        labels: (N,) int64, or (N, C) of 0 and 1 where a sample may have several.
        num_classes: C.

    Raises:
        ValueError: a class has no sample.

    >>> class_prototypes(torch.tensor([[2.0, 0.0], [0.0, 3.0], [4.0, 0.0]]), torch.tensor([0, 1, 0]), 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    marks = labels if labels.ndim == 2 else F.one_hot(labels, num_classes)
    if empty := (~marks.bool().any(0)).nonzero()[:, 0].tolist():
        raise ValueError(f"every class must have a sample, these have none: {', '.join(map(str, empty))}")
    return F.normalize(marks.to(embeddings.dtype).mT @ embeddings, dim=-1)


def zero_shot(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """(N, C): the cosine of each embedding (N, E) with each class's prototype (C, E)."""
    return F.normalize(embeddings, dim=-1) @ F.normalize(prototypes, dim=-1).mT
