"""What one patient's images and label look like on the way from disk to a model.

Shapes: B batch, I images per modality, C classes; images are (3, H, W), float32, normalised.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One row, loaded: ``images[modality]`` is (I, 3, H, W); ``label`` is () int64, (C,) float32, or None.

    A modality that the sample lacks is (0, 3, H, W).
    """

    id: str
    images: dict[str, Tensor]
    label: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Samples side by side.

    Samples may have different numbers of images: each modality is padded with zeros to the largest
    number in the batch, at least one, and ``present[modality]`` (B, I) says which images are real.
    """

    images: dict[str, Tensor]  # modality -> (B, I, 3, H, W)
    present: dict[str, Tensor]  # modality -> (B, I) bool
    labels: Tensor | None = None  # (B,) int64 for one label per sample, (B, C) float32 for several
    ids: list[str] = field(default_factory=list)
    counts: bool = True
    """False: not part of the loss, only there so that a process without samples takes part in the step."""

    def image_count(self) -> int:
        """How many images count."""
        return sum(int(present.sum()) for present in self.present.values()) if self.counts else 0

    def to(self, device: torch.device | str) -> "Batch":
        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {modality: tensor.to(device, non_blocking=True) for modality, tensor in tensors.items()}

        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(self, images=moved(self.images), present=moved(self.present), labels=labels)

    def has(self, modality: str) -> Tensor:
        """Which samples have an image of a modality: (B,) bool.

        Raises:
            ValueError: the batch knows no such modality.

        >>> Batch(images={}, present={"oct": torch.tensor([[True, False], [False, False]])}).has("oct")
        tensor([ True, False])
        """
        if modality not in self.present:
            raise ValueError(
                f"the batch must have images of modality '{modality}', it has those of {list(self.present)}"
            )
        return self.present[modality].any(1)

    def has_each(self, modalities: Sequence[str]) -> Tensor:
        """Which samples have an image of which modality: (B, M) bool, at least one True in every row.

        Raises:
            ValueError: a sample has none of them; all such samples are named.
        """
        has = torch.stack([self.has(modality) for modality in modalities], dim=1)
        if empty := (~has.any(1)).nonzero()[:, 0].tolist():
            names = ", ".join(self.ids[row] if self.ids else f"row {row}" for row in empty)
            either = " or ".join(f"'{modality}'" for modality in modalities)
            raise ValueError(f"every sample must have an image of modality {either}, these have none: {names}")
        return has

    def __len__(self) -> int:
        return len(self.ids)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a :class:`Batch`, padding each modality to its largest number of images, at least one.

    Raises:
        ValueError: some samples have a label and others do not.
    """
    images, present = {}, {}
    for modality in samples[0].images:
        stacks = [sample.images[modality] for sample in samples]
        counts = torch.tensor([len(stack) for stack in stacks])
        most = max(1, int(counts.max()))
        padded = stacks[0].new_zeros(len(stacks), most, *stacks[0].shape[1:])
        for row, stack in zip(padded, stacks, strict=True):
            row[: len(stack)] = stack
        images[modality] = padded
        present[modality] = torch.arange(most) < counts[:, None]
    labels = [sample.label for sample in samples if sample.label is not None]
    if len(labels) not in (0, len(samples)):
        without = [sample.id for sample in samples if sample.label is None]
        raise ValueError(f"samples of a batch must all have a label, or none; {', '.join(without[:8])} have none")
    return Batch(
        images=images,
        present=present,
        labels=torch.stack(labels) if labels else None,
        ids=[sample.id for sample in samples],
    )
