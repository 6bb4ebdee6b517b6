"""Early Intervention: before a ViT looks at one modality, it is told what the other modalities show.

Shapes: B batch, M modalities, D width, C classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.fusion import LateFusion, branch_of, branches, module_key
from ei.models.output import Output
from ei.models.unimodal import UniModal


class EarlyIntervention(LateFusion):
    """Two ViTs per modality: an auxiliary one that sums it up for the others, and a primary one that listens.

    For a target t, the summaries of the M - 1 references r become intervention tokens

        [INT]_t = (adapter_{t<-r}(cls^aux_r) for r != t),   logits_t = head_t(primary_t(images_t, [INT]_t))

    which join t's own tokens before its first block; all images of t get the same ones. A token of a reference that
    the sample lacks is not seen. The rest is :class:`ei.models.fusion.LateFusion`.

    Args:
        primary: Backbone of each modality, in the order in which weights are given out.
        auxiliary: Backbone of each modality for its summary; may be of another width, or the primary one itself.
        num_classes: C.
        int_hidden: Hidden width of the INT adapters.
        int_from: Block of the auxiliary ViT after which its summary for the others is read, from 1; 0 means the
            last. The auxiliary logits always come from the last.
        int_at: Block of the primary ViT before which the tokens enter, from 0.
        detach_fusion: See :class:`ei.models.fusion.ModalityFusion`.

    Raises:
        ValueError: there are fewer than two modalities, or a backbone has no such block.

    Source: arXiv 2603.17514, sections 3.1 and 3.2.
    """

    def __init__(
        self,
        primary: Mapping[str, Backbone],
        auxiliary: Mapping[str, Backbone],
        num_classes: int,
        *,
        int_hidden: int = 384,
        int_from: int = 0,
        int_at: int = 0,
        detach_fusion: bool = True,
    ) -> None:
        super().__init__(primary, num_classes, detach_fusion=detach_fusion)
        if set(auxiliary) != set(primary):
            raise ValueError(
                f"auxiliary must have a backbone for each of {list(primary)}, it has them for {list(auxiliary)}"
            )
        for modality in self.modalities:
            primary[modality].check_positions(tokens_at=int_at)
            auxiliary[modality].check_positions(read_from=int_from)
        self.int_from, self.int_at = int_from, int_at
        self.auxiliary = branches(auxiliary, num_classes)
        self.int_adapters = nn.ModuleDict(
            {
                module_key(target): nn.ModuleDict(
                    {
                        module_key(reference): int_adapter(
                            auxiliary[reference].width, int_hidden, primary[target].width
                        )
                        for reference in self._references(target)
                    }
                )
                for target in self.modalities
            }
        )

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)  # (B, M)
        told, aux_logits, summaries = {}, {}, {}
        for modality in self.modalities:
            branch = self._auxiliary(modality)
            told[modality], last = branch.summaries(batch, read_from=(self.int_from, 0))  # (B, D) each
            aux_logits[modality] = branch.head(last)
        lacking = not has.all()
        for target in self.modalities:
            tokens = self._tokens(target, told)  # (B, M - 1, D)
            token_mask = self._of_references(target, has) if lacking else None
            summaries[target] = self._primary(target).summaries(
                batch, tokens, token_mask=token_mask, tokens_at=self.int_at
            )[0]
        return self._fuse(summaries, has, aux_logits)

    def parts(self) -> dict[str, list[nn.Module]]:
        shared = super().parts()
        auxiliary = [self._auxiliary(modality) for modality in self.modalities]
        return {
            "primary ViTs": shared["primary ViTs"],
            "auxiliary ViTs": [branch.backbone for branch in auxiliary],
            "INT adapters": [self.int_adapters],
            "heads": shared["heads"] + [branch.head for branch in auxiliary],
            "fusion": shared["fusion"],
        }

    def extra_repr(self) -> str:
        return f"int_from={self.int_from}, int_at={self.int_at}"

    def _tokens(self, target: str, told: Mapping[str, Tensor]) -> Tensor:
        """What the references tell the target: (B, M - 1, D)."""
        adapters = self.int_adapters[module_key(target)]
        assert isinstance(adapters, nn.ModuleDict)
        return torch.stack([adapters[module_key(r)](told[r]) for r in self._references(target)], dim=1)

    def _of_references(self, target: str, has: Tensor) -> Tensor:
        """The columns of the target's references: (B, M) -> (B, M - 1)."""
        return has[:, [self.modalities.index(r) for r in self._references(target)]]

    def _references(self, target: str) -> list[str]:
        return [modality for modality in self.modalities if modality != target]

    def _auxiliary(self, modality: str) -> UniModal:
        return branch_of(self.auxiliary, modality)

    def _learners(self, modality: str) -> dict[str, UniModal]:
        return {**super()._learners(modality), "auxiliary": self._auxiliary(modality)}


def int_adapter(source: int, hidden: int, target: int) -> nn.Sequential:
    """From a reference's summary (B, source) to an intervention token (B, target).

    >>> sum(p.numel() for p in int_adapter(768, 384, 768).parameters())
    592512
    """
    return nn.Sequential(nn.LayerNorm(source), nn.Linear(source, hidden), nn.GELU(), nn.Linear(hidden, target))
