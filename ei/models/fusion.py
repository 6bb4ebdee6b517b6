"""From one prediction per modality to one prediction: the gate, and the classifier that does nothing else.

Shapes: B batch, M modalities, D width, C classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

import mor
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.output import Classifier, Output
from ei.models.unimodal import UniModal
from ei.models.weights import misfit


class ModalityFusion(nn.Module):
    """``logits = sum_m w_m logits_m`` with ``w = softmax(W_g [cls_1; ..; cls_M] + b_g)``.

    The softmax is over the modalities that a sample has; the others weigh 0.

    Args:
        widths: D of each modality.
        detach: The fused loss reaches the gate alone, not what it weighs.

    Source: arXiv 2603.17514, section 3.3, equation 3.

    >>> fusion = ModalityFusion([8, 8])
    >>> logits, weights = fusion([torch.zeros(5, 8)] * 2, [torch.zeros(5, 3)] * 2)
    >>> logits.shape, weights.shape
    (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    def __init__(self, widths: Sequence[int], *, detach: bool = True) -> None:
        super().__init__()
        self.detach = detach
        self.gate = nn.Linear(sum(widths), len(widths))

    def forward(
        self, summaries: Sequence[Tensor], logits: Sequence[Tensor], has: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """M summaries (B, D) and M logits (B, C) -> logits (B, C) and weights (B, M), fp32 or wider.

        ``has`` (B, M) bool says which modalities a sample has, at least one; None: all.
        """
        joined, each = (
            torch.cat(list(summaries), dim=-1),
            torch.stack(list(logits), dim=1),
        )  # (B, MD), (B, M, C)
        if self.detach:
            joined, each = joined.detach(), each.detach()
        scores = self.gate(joined)
        if has is not None:
            scores = scores.masked_fill(~has, -math.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return (weights[..., None] * each).sum(1), weights

    def extra_repr(self) -> str:
        return f"detach={self.detach}"


class LateFusion(Classifier):
    """A ViT and a head per modality, and their predictions fused: Early Intervention without intervention.

    A sample may lack modalities, though not all: they have a summary of zeros and the weight 0.

    Args:
        primary: Backbone of each modality, in the order in which weights are given out.
        num_classes: C.
        detach_fusion: See :class:`ModalityFusion`.
        fusion: Something else in place of that, called with the same.

    Raises:
        ValueError: there are fewer than two modalities.
    """

    def __init__(
        self,
        primary: Mapping[str, Backbone],
        num_classes: int,
        *,
        detach_fusion: bool = True,
        fusion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.modalities = at_least_two(primary)
        self.primary = branches(primary, num_classes)
        widths = [backbone.width for backbone in primary.values()]
        self.fusion = fusion or ModalityFusion(widths, detach=detach_fusion)

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)
        return self._fuse({name: self._primary(name).summaries(batch)[0] for name in self.modalities}, has)

    @torch.no_grad()
    def start_from(
        self, stage1: Mapping[str, Mapping[str, Tensor]], auxiliary: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Take over what each modality's :class:`UniModal` has learned; the primary heads stay new.

        Args:
            stage1: Per modality, the trained parameters of its UniModal by name.
            auxiliary: The same for the auxiliary ViTs, if their backbone is another one; else they take ``stage1``.

        Raises:
            ValueError: modalities, names or shapes do not fit; all differences come in one message, and
                nothing was changed.
        """
        sources = {"primary": stage1, "auxiliary": stage1 if auxiliary is None else auxiliary}
        self._refuse_misfits(sources)
        for modality in self.modalities:
            for role, branch in self._learners(modality).items():
                for name, parameter in mor.trainable_parameters(branch).items():
                    if not (role == "primary" and name.startswith("head.")):
                        parameter.copy_(sources[role][modality][name])

    def parts(self) -> dict[str, list[nn.Module]]:
        primary = [self._primary(modality) for modality in self.modalities]
        return {
            "primary ViTs": [branch.backbone for branch in primary],
            "heads": [branch.head for branch in primary],
            "fusion": [self.fusion],
        }

    def _primary(self, modality: str) -> UniModal:
        return branch_of(self.primary, modality)

    def _learners(self, modality: str) -> dict[str, UniModal]:
        """The branches that start from the modality's first stage, by their role."""
        return {"primary": self._primary(modality)}

    def _fuse(self, summaries: dict[str, Tensor], has: Tensor, aux_logits: dict[str, Tensor] | None = None) -> Output:
        each = {modality: self._primary(modality).head(summary) for modality, summary in summaries.items()}
        logits, weights = self.fusion(list(summaries.values()), list(each.values()), has)
        return Output(logits=logits, modality_logits=each, aux_logits=aux_logits or {}, modality_weights=weights)

    def _refuse_misfits(self, sources: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
        for stage1 in sources.values():
            if set(stage1) != set(self.modalities):
                raise ValueError(
                    f"stage 1 must be given for the modalities {list(self.modalities)}, got it for {list(stage1)}"
                )
        problems = {
            modality: problem
            for modality in self.modalities
            for role, branch in self._learners(modality).items()
            if (problem := misfit(mor.trainable_parameters(branch), sources[role][modality]))
        }
        if problems:
            listed = "; ".join(f"of '{modality}': {problem}" for modality, problem in problems.items())
            raise ValueError(f"the parameters of stage 1 do not fit {listed}")


def branches(backbones: Mapping[str, Backbone], num_classes: int) -> nn.ModuleDict:
    """A :class:`UniModal` around every backbone, to be found again with :func:`branch_of`."""
    return nn.ModuleDict(
        {module_key(modality): UniModal(backbone, modality, num_classes) for modality, backbone in backbones.items()}
    )


def branch_of(modules: nn.ModuleDict, modality: str) -> UniModal:
    branch = modules[module_key(modality)]
    assert isinstance(branch, UniModal)
    return branch


def at_least_two(modalities: Iterable[str]) -> tuple[str, ...]:
    """Those modalities; a ValueError if there is nothing to fuse."""
    names = tuple(modalities)
    if len(names) < 2:
        raise ValueError(f"modalities must be at least two to be fused, got {list(names)}")
    return names


def module_key(modality: str) -> str:
    """The modality's name as a module may be called: without dots, and never an attribute of nn.ModuleDict.

    >>> module_key("oct"), module_key("T1 1.5 T"), module_key("keys")
    ('modality_oct', 'modality_T1 1%2E5 T', 'modality_keys')
    """
    return "modality_" + modality.replace("%", "%25").replace(".", "%2E")
