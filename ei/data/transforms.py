"""From a decoded image to what a ViT reads: augmented in training, resized to a square, normalised.

Images are (3, H, W), float32 in 0..1; results are (3, ``image_size``, ``image_size``), normalised. Random
parts draw from torch's global CPU generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from ei.config import DataConfig


class Transform:
    """Two parts, one after the other: ``fixed``, the same every time, then ``varied``, in which chance plays a part."""

    def __init__(self, fixed: Sequence[nn.Module], varied: Sequence[nn.Module] = ()) -> None:
        self._fixed, self._varied = nn.Sequential(*fixed), nn.Sequential(*varied)

    def __call__(self, image: Tensor) -> Tensor:
        return self.varied(self.fixed(image))

    def fixed(self, image: Tensor) -> Tensor:
        # In one order in memory, however the image came here: last bits may depend on it.
        return self._fixed(image).contiguous()

    def varied(self, image: Tensor) -> Tensor:
        return self._varied(image)

    def recipe(self) -> str:
        """What the fixed part does, with all of its numbers."""
        return repr(self._fixed)


def evaluation_transform(config: DataConfig) -> Transform:
    """Resize (bilinear, antialiased, without regard to the aspect) and normalise.

    Example:
        With ``image_size=224``, mean 0.5 and std 0.25, a white (3, 480, 640) image becomes (3, 224, 224)
        of the value 2.0.
    """
    return Transform(fixed=_to_input(config))


def training_transform(config: DataConfig) -> Transform:
    """Rotate, crop, flip and jitter at random, then do as in evaluation.

    In this order: rotation by up to ``rotation`` degrees either way, uncovered corners black; with
    probability 0.5 a crop of up to the share ``crop`` of each side, every side on its own; with probability
    ``flip`` a horizontal flip; brightness, contrast and saturation scaled by 1 - jitter .. 1 + jitter. A
    strength of zero leaves its part out; with all of them zero this is :func:`evaluation_transform`.

    Images more than twice as large as needed are shrunk to twice that first, because turning the full frame
    of a camera takes most of a second.

    Source: arXiv 2603.17514, implementation details.
    """
    augmentation = _augmentation(config)
    if not augmentation:
        return evaluation_transform(config)
    return Transform(fixed=[ShrinkLarge(2 * config.image_size)], varied=[*augmentation, *_to_input(config)])


class ShrinkLarge(nn.Module):
    """Shrink, keeping the aspect, until the shorter side is at most ``side``; others stay as they are."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.resize = v2.Resize(side, interpolation=v2.InterpolationMode.BILINEAR, antialias=True)

    def forward(self, image: Tensor) -> Tensor:
        return self.resize(image) if min(image.shape[-2:]) > self.side else image


class RandomSideCrop(nn.Module):
    """With probability 0.5, cut up to ``share`` of the height or width away at each of the four sides."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, image: Tensor) -> Tensor:
        if torch.rand(()) >= 0.5:
            return image
        height, width = image.shape[-2:]
        top, bottom, left, right = (torch.rand(4) * self.share).tolist()
        rows = slice(int(top * height), height - int(bottom * height))
        columns = slice(int(left * width), width - int(right * width))
        return image[..., rows, columns]


def _augmentation(config: DataConfig) -> list[nn.Module]:
    parts: list[nn.Module] = []
    if config.rotation:
        parts.append(v2.RandomRotation(config.rotation, interpolation=v2.InterpolationMode.BILINEAR))
    if config.crop:
        parts.append(RandomSideCrop(config.crop))
    if config.flip:
        parts.append(v2.RandomHorizontalFlip(config.flip))
    if config.jitter:
        parts.append(v2.ColorJitter(config.jitter, config.jitter, config.jitter))
    return parts


def _to_input(config: DataConfig) -> list[nn.Module]:
    side = config.image_size
    return [
        v2.Resize((side, side), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
        v2.Normalize(config.mean, config.std),
    ]
