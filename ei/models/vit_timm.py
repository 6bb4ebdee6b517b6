"""Backbones from timm, and the small one for trials on a CPU, which is a timm model, too."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ei.models.vit import REQUIREMENT, Backbone, near, padded, published_weights_of


class TimmBackbone(Backbone):
    """A backbone around timm's VisionTransformer."""

    def __init__(self, vit: Any, image_size: int) -> None:
        vit.reset_classifier(0)
        vit.attn_pool = None
        super().__init__(
            vit,
            width=vit.embed_dim,
            depth=len(vit.blocks),
            image_size=image_size,
            patch_size=vit.patch_embed.patch_size[0],
        )

    def token_count(self) -> int:
        return self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens

    def _embed(self, images: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        return self.vit.norm_pre(self.vit.patch_drop(x))

    def _blocks(self) -> Sequence[nn.Module]:
        return list(self.vit.blocks)

    def _masked(self, block: Any, x: Tensor, seen: Tensor) -> Tensor:
        # Added to the logits, not boolean: outside of torch's fused attention, older versions of timm only add.
        mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -math.inf)
        return block(x, attn_mask=mask[:, None, None])

    def _final_norm(self, x: Tensor) -> Tensor:
        # timm keeps the final norm in one of the two places, the other is the identity.
        return self.vit.fc_norm(self.vit.norm(x))

    def _translated(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # timm would also resample kernels of another patch size; that is another backbone, so it must not fit.
        if not self._same_patches(state):
            return state
        return checkpoint_filter_fn(dict(state), self.vit, adapt_layer_scale=True)


def load_timm(name: str, image_size: int, published: bool) -> TimmBackbone:
    """The named model for images of one size, ``published``: with its weights from the hub, else random."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(
            f"backbone must be 'tiny', open_clip:NAME or a timm model, got '{name}'"
            f"{near(architecture, timm.list_models())}"
        )
    try:
        with torch.device("meta"):
            plan: Any = timm.create_model(name, pretrained=False)
    except RuntimeError as error:
        raise ValueError(f"backbone '{name}' is not known to timm: {error}") from error
    require_vit(name, plan)
    # Fixed sizes: dynamic ones would resample the position embeddings in every step.
    size = padded(image_size, plan.patch_embed.patch_size[0])
    with published_weights_of(name) if published else nullcontext():
        vit = timm.create_model(name, pretrained=published, num_classes=0, img_size=size, dynamic_img_size=False)
    return TimmBackbone(vit, image_size)


def load_tiny(image_size: int) -> TimmBackbone:
    """A random ViT of width 64 with 4 blocks of 4 heads and 16 to 64 patches, whatever the size of the image."""
    patch_size = tiny_patch_size(image_size)
    vit = VisionTransformer(
        img_size=padded(image_size, patch_size),
        patch_size=patch_size,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=0,
    )
    return TimmBackbone(vit, image_size)


def tiny_patch_size(image_size: int) -> int:
    """Patch of the 'tiny' backbone: the largest one that cuts a side into 4 to 8 equal parts, else into 8 padded.

    >>> [tiny_patch_size(side) for side in (8, 32, 48, 224, 37)]
    [2, 8, 12, 56, 5]
    """
    whole = [image_size // parts for parts in range(4, 9) if image_size % parts == 0]
    return whole[0] if whole else math.ceil(image_size / 8)


def require_vit(name: str, model: nn.Module) -> None:
    """Raise a ValueError if the model cannot be a :class:`TimmBackbone`."""
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{REQUIREMENT}, got '{name}', which is a {type(model).__name__}")
    if model.cls_token is None:
        raise ValueError(f"{REQUIREMENT}, got '{name}', which has no class token")
    if type(model.patch_embed) is not PatchEmbed:
        raise ValueError(f"{REQUIREMENT}, got '{name}', which begins with a {type(model.patch_embed).__name__}")
