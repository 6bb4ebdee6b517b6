"""One modality, one ViT, one head: the classifier of the first stage, and the branch of every larger model.

Shapes: B batch, I images per modality, D width, C classes; images are (B, I, 3, H, W).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.output import Classifier, Output


class Encoder(nn.Module):
    """The ViT of a modality, and what it makes of a batch's images.

    Args:
        backbone: Taken as it is, so adapters are put into it before.
        modality: Key of the batch's images.
    """

    def __init__(self, backbone: Backbone, modality: str) -> None:
        super().__init__()
        self.modality = modality
        self.backbone = backbone

    def summaries(
        self,
        batch: Batch,
        tokens: Tensor | None = None,
        *,
        token_mask: Tensor | None = None,
        tokens_at: int = 0,
        read_from: Sequence[int] = (0,),
    ) -> list[Tensor]:
        """(B, D) per block in ``read_from``: the mean over each sample's images, zero for samples without any.

        Args:
            batch: Only images that are present pass through the ViT.
            tokens: (B, n, D), given to every image of their sample.
            token_mask: (B, n) bool, which tokens each sample's images see; None: all.
            tokens_at, read_from: As in :meth:`ei.models.vit.Backbone.forward`.
        """
        present = batch.present[self.modality]
        if not present.any() and not torch.is_grad_enabled():
            return [batch.images[self.modality].new_zeros(len(present), self.backbone.width) for _ in read_from]
        images, sample_of_image = self._images(batch)
        if tokens is not None:
            tokens = tokens[sample_of_image]
            token_mask = None if token_mask is None else token_mask[sample_of_image]
        by_image = self.backbone(images, tokens, token_mask, tokens_at=tokens_at, read_from=tuple(read_from))
        return [mean_over_images(summary, present) for summary in by_image]

    def by_image(self, batch: Batch) -> Tensor:
        """(B, I, D): the CLS token of each image, zero where there is none."""
        return by_sample(self.backbone(self._images(batch)[0]), batch.present[self.modality])

    def maps(self, batch: Batch, added: Callable[[Tensor], Sequence[Tensor]] | None = None) -> Tensor:
        """(B, P, D): the patch map after the final norm, mean over each sample's images, zero for those without any.

        Args:
            batch: Only images that are present pass through the ViT.
            added: From images to what :meth:`ei.models.vit.Backbone.forward` adds to their patches.
        """
        images, _ = self._images(batch)
        _, patches = self.backbone.features(images, added(images) if added else ())
        return mean_over_images(patches, batch.present[self.modality])

    def _images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images that are present, (N, 3, H, W), and the number of each one's sample, (N,)."""
        present = batch.present[self.modality]
        images, sample_of_image = batch.images[self.modality][present], present.nonzero()[:, 0]
        if not len(images):
            # A blank image that counts for no sample: so every parameter gets a gradient, which is zero, and in
            # training on several processes none waits for one that never comes.
            images, sample_of_image = images.new_zeros(1, *images.shape[1:]), sample_of_image.new_zeros(1)
        return images, sample_of_image


class UniModal(Encoder, Classifier):
    """``logits = head(summary)``, where the summary of a sample is the mean of its images' CLS tokens.

    Args:
        backbone: Taken as it is, so adapters are put into it before.
        modality: Key of the batch's images.
        num_classes: C.

    Source: arXiv 2603.17514, section 4.3.4.

    >>> import torch
    >>> from ei.config import ModelConfig
    >>> from ei.models.backbone import load_backbone
    >>> model = UniModal(load_backbone(ModelConfig(backbone="tiny"), image_size=32), "oct", num_classes=4)
    >>> images = {"oct": torch.zeros(2, 1, 3, 32, 32)}
    >>> model(Batch(images, present={"oct": torch.ones(2, 1, dtype=torch.bool)})).logits.shape
    torch.Size([2, 4])
    """

    def __init__(self, backbone: Backbone, modality: str, num_classes: int) -> None:
        super().__init__(backbone, modality)
        self.head = nn.Linear(backbone.width, num_classes)

    def forward(self, batch: Batch) -> Output:
        """``logits`` (B, C), which are this modality's, too.

        Raises:
            ValueError: a sample has no image of this modality, so there is nothing to say about it.
        """
        batch.has_each([self.modality])
        (summary,) = self.summaries(batch)
        logits = self.head(summary)
        return Output(logits=logits, modality_logits={self.modality: logits})

    def parts(self) -> dict[str, list[nn.Module]]:
        return {"ViT": [self.backbone], "heads": [self.head]}


def by_sample(values: Tensor, present: Tensor) -> Tensor:
    """What each image has, laid out by sample, zero where there is no image.

    Args:
        values: (N, ...), one row per image that is present, sample after sample; if there are none, one that is not
            looked at.
        present: (B, I) bool with N times True.

    Returns:
        (B, I, ...).
    """
    padded = values.new_zeros(*present.shape, *values.shape[1:])
    padded[present] = values[: int(present.sum())]
    return padded


def mean_over_images(values: Tensor, present: Tensor) -> Tensor:
    """Mean of each sample's images; zero for a sample without any.

    Args:
        values, present: See :func:`by_sample`.

    Returns:
        (B, ...).

    >>> import torch
    >>> present = torch.tensor([[True, True], [True, False], [False, False]])
    >>> mean_over_images(torch.tensor([[1.0], [3.0], [5.0]]), present).tolist()
    [[2.0], [5.0], [0.0]]
    """
    count = present.sum(1).clamp_min(1).reshape(-1, *[1] * (values.ndim - 1))
    return by_sample(values, present).sum(1) / count
