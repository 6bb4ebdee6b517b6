"""What most baselines are: a ViT per modality, something that fuses what they see, and a head.

Shapes: B batch, M modalities, I images per modality, P patches, D width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.fusion import at_least_two, module_key
from ei.models.output import Classifier
from ei.models.unimodal import Encoder


class FusionModel(Classifier):
    """The base class; a subclass adds ``fusion``, ``head`` and ``forward``.

    Args:
        modalities: At least two.
        fresh: Makes a backbone with adapters of its own.

    Raises:
        ValueError: there are fewer than two modalities.
    """

    fusion: nn.Module
    head: nn.Module

    def __init__(self, modalities: Sequence[str], fresh: Callable[[], Backbone]) -> None:
        super().__init__()
        self.modalities = at_least_two(modalities)
        self.encoders = encoders(modalities, fresh)

    @property
    def width(self) -> int:
        """D."""
        return self.encoder(self.modalities[0]).backbone.width

    def encoder(self, modality: str) -> Encoder:
        found = self.encoders[module_key(modality)]
        assert isinstance(found, Encoder)
        return found

    def summaries(self, batch: Batch) -> Tensor:
        """(B, M, D): of each modality the mean over the images of their CLS tokens, zero where there are none."""
        return torch.stack([self.encoder(modality).summaries(batch)[0] for modality in self.modalities], dim=1)

    def maps(self, batch: Batch) -> Tensor:
        """(B, M, P, D): the same of patch maps."""
        return torch.stack([self.encoder(modality).maps(batch) for modality in self.modalities], dim=1)

    def parts(self) -> dict[str, list[nn.Module]]:
        return {
            "ViTs": [self.encoder(modality).backbone for modality in self.modalities],
            "fusion": [self.fusion],
            "heads": [self.head],
        }


def require_divided(width: int, name: str, heads: int) -> None:
    """Raise a ValueError if an attention of this width cannot have so many heads, which the setting ``name`` asks for.

    >>> require_divided(768, "sfusion_heads", 4)
    """
    if width % heads:
        raise ValueError(f"{name} must divide the width of the attention, {width}, got {heads}")


def encoders(modalities: Sequence[str], fresh: Callable[[], Backbone]) -> nn.ModuleDict:
    """An :class:`Encoder` of each modality."""
    return nn.ModuleDict({module_key(modality): Encoder(fresh(), modality) for modality in modalities})
