"""Backbones from open_clip: the vision towers of its CLIP models. Importing open_clip takes seconds."""

import math
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ei.models.vit import REQUIREMENT, Backbone, near, padded, published_weights_of
from ei.models.vit_timm import TimmBackbone, require_vit


class OpenClipBackbone(Backbone):
    """A backbone around the vision tower that open_clip builds itself."""

    def __init__(self, vit: Any, image_size: int) -> None:
        vit.proj = None
        super().__init__(
            vit,
            width=vit.conv1.out_channels,
            depth=len(vit.transformer.resblocks),
            image_size=image_size,
            patch_size=vit.patch_size[0],
        )

    def token_count(self) -> int:
        return math.prod(self.vit.grid_size) + 1

    def _embed(self, images: Tensor) -> Tensor:
        return self.vit._embeds(images)

    def _blocks(self) -> Sequence[nn.Module]:
        return list(self.vit.transformer.resblocks)

    def _masked(self, block: Any, x: Tensor, seen: Tensor) -> Tensor:
        if not isinstance(block.attn, nn.MultiheadAttention):
            return block(x, attn_mask=~seen[:, None, None])
        # The block would take a mask for each head and pair of tokens only; its attention takes one for each token.
        y = block.ln_1(x)
        x = x + block.ls_1(block.attn(y, y, y, key_padding_mask=~seen, need_weights=False)[0])
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.vit.ln_post(x)

    def _translated(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a file with a whole CLIP model, the vision tower's part is taken."""
        prefix = "visual."
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        positions = state["positional_embedding"][None]
        resized = resample_abs_pos_embed(positions, new_size=list(self.vit.grid_size))[0]
        return state | {"positional_embedding": resized}


def load_open_clip(name_and_tag: str, image_size: int, published: bool) -> Backbone:
    """A model's vision tower, named 'NAME[:PRETRAINED]'; ``published``: with its weights from the hub, else random."""
    name, _, tag = name_and_tag.partition(":")
    settings = open_clip.get_model_config(name)
    if settings is None:
        raise ValueError(
            f"backbone must name a model of open_clip after 'open_clip:', got '{name}'"
            f"{near(name, open_clip.list_models())}"
        )
    with torch.device("meta"):
        patch_size = _patch_size(f"open_clip:{name}", _tower(settings))
    size = padded(image_size, patch_size)
    if published or tag:
        require_published(name_and_tag)
    if published:
        # Without this open_clip would only warn that the weights were trained with another activation.
        quick_gelu = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
        with published_weights_of(f"open_clip:{name}:{tag}"):
            tower = open_clip.create_model(
                name,
                pretrained=tag,
                force_image_size=size,
                force_patch_dropout=0.0,
                force_quick_gelu=quick_gelu,
            ).visual
    else:
        tower = _tower(settings, image_size=size)
    if isinstance(tower, VisionTransformer):
        return OpenClipBackbone(tower, image_size)
    tower.trunk.set_input_size(img_size=(size, size))
    return TimmBackbone(tower.trunk, image_size)


def _tower(settings: dict[str, Any], **changes: Any) -> Any:
    # create_model would build the text tower besides, for which it may need the network.
    vision = settings["vision_cfg"] | {"patch_dropout": 0.0, "timm_model_pretrained": False} | changes
    return _build_vision_tower(settings["embed_dim"], vision, settings.get("quick_gelu", False))


def _patch_size(name: str, tower: Any) -> int:
    """The patch size of a tower; one that cannot be a backbone is a ValueError."""
    if isinstance(tower, VisionTransformer):
        if tower.attn_pool is not None:
            raise ValueError(f"{REQUIREMENT}, got '{name}', which summarises by attention pooling")
        return tower.patch_size[0]
    trunk = getattr(tower, "trunk", tower)
    require_vit(name, trunk)
    return trunk.patch_embed.patch_size[0]


def require_published(name_and_tag: str) -> None:
    """Raise a ValueError unless the model's name is followed by the name of weights that are published."""
    name, _, tag = name_and_tag.partition(":")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        got = f"'{tag}'" if tag else "none"
        raise ValueError(
            f"backbone open_clip:{name} must be followed by ':' and one of its published weights"
            f" ({', '.join(tags) or 'it has none'}), got {got}; or pass --weights FILE or --no-pretrained"
        )
