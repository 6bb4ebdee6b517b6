"""VPT-deep: learned tokens before every block."""

import math

from torch import nn

from ei.config import ModelConfig
from ei.models.adapters.settings import new_parameter
from ei.models.vit import Backbone


def vpt(backbone: Backbone, config: ModelConfig) -> None:
    """``config.prompts`` learned tokens enter each block with the image's own, and leave after it.

    So what a block makes of its prompts goes nowhere but into the other tokens, and the next block gets its own ones.
    They are drawn from U(-v, v), v = sqrt(6 / (3 * patch_size ** 2 + D)), so that the start is not the frozen
    backbone's. Where they stand does not matter; it is behind the class token.

    Source: arXiv 2203.12119, section 3; 5 prompts are the default of its public code.

    >>> from ei.models.vit_timm import load_tiny
    >>> backbone = load_tiny(image_size=32)
    >>> vpt(backbone, ModelConfig(adapter="vpt"))
    >>> tuple(backbone.prompts.shape)
    (4, 5, 64)
    """
    like = next(backbone.vit.parameters())
    backbone.prompts = new_parameter(backbone.depth, config.prompts, backbone.width, like=like)
    limit = math.sqrt(6 / (3 * backbone.patch_size**2 + backbone.width))
    nn.init.uniform_(backbone.prompts, -limit, limit)
