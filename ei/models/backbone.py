"""Which backbone a configuration means, and how it learns."""

import torch

from ei.config import ModelConfig
from ei.models.adapters import method
from ei.models.vit import Backbone
from ei.models.vit_timm import load_timm, load_tiny

__all__ = ["Backbone", "adapted", "load_backbone"]


def load_backbone(config: ModelConfig, image_size: int) -> Backbone:
    """The frozen backbone that a configuration names, for square images of one size.

    Names:
        - a timm name, e.g. 'vit_base_patch16_clip_224.openai': any VisionTransformer with a class token
          and one convolution as patch embedding;
        - 'open_clip:NAME[:PRETRAINED]', e.g. 'open_clip:ViT-B-16:openai': open_clip's own vision towers, or
          towers that are such a timm model;
        - 'tiny': width 64, 4 blocks of 4 heads, random, 4 to 8 patches a side.

    Weights come from the file ``config.weights``, else, with ``config.pretrained``, from the hub. Position
    embeddings are resized to the image size once, here. On the meta device (``with torch.device("meta")``)
    no weights are read.

    Args:
        config: Only ``backbone``, ``pretrained`` and ``weights`` are used.
        image_size: Side of the images, in pixels; need not be a multiple of the patch size.

    Raises:
        ValueError: the name is unknown or means another kind of model (nothing is downloaded then), or its
            weights cannot be had or do not fit.

    >>> backbone = load_backbone(ModelConfig(backbone="tiny"), image_size=32)
    >>> backbone.width, backbone.depth, backbone.patch_size
    (64, 4, 8)
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    on_meta = torch.get_default_device().type == "meta"
    published = config.pretrained and not config.weights and not on_meta
    if config.backbone == "tiny":
        backbone: Backbone = load_tiny(image_size)
    elif config.backbone.startswith("open_clip:"):
        # Imported here: it takes seconds, and only these names need it.
        from ei.models.vit_open_clip import load_open_clip

        backbone = load_open_clip(config.backbone.removeprefix("open_clip:"), image_size, published)
    else:
        backbone = load_timm(config.backbone, image_size, published)
    if config.weights and not on_meta:
        backbone.load(config.weights)
    return backbone


def require_weights(config: ModelConfig, image_size: int) -> None:
    """Raise the ValueError that :func:`load_backbone` would because of the weights, without reading or asking for them.

    Of a file, names and shapes are looked at. Whether the hub has published weights does not show here.

    >>> require_weights(ModelConfig(backbone="tiny"), image_size=32)
    """
    with torch.device("meta"):
        backbone = load_backbone(config, image_size)
    if config.weights:
        backbone.require_fitting(config.weights)
    elif config.pretrained and config.backbone.startswith("open_clip:"):
        from ei.models.vit_open_clip import require_published

        require_published(config.backbone.removeprefix("open_clip:"))


def adapted(trunk: Backbone, config: ModelConfig) -> Backbone:
    """A backbone of ``trunk``'s weights that learns as ``config.adapter`` says; ``trunk`` stays as it is.

    What is frozen are the trunk's own tensors, what is trained is new; see :mod:`ei.models.adapters`.

    Raises:
        ValueError: a setting does not go with the adapter or the backbone, or a target matches nothing.

    >>> trunk = load_backbone(ModelConfig(backbone="tiny"), image_size=32)
    >>> sum(p.numel() for p in adapted(trunk, ModelConfig()).parameters() if p.requires_grad)
    40992
    """
    backbone = trunk.fork()
    method(config.adapter)(backbone, config)
    return backbone
