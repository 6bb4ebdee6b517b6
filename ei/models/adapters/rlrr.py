"""RLRR: every weight matrix of the blocks is rescaled by a learned matrix of rank one.

Shapes: K in, O out, P projections packed in one layer (3 in qkv, else 1), D width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ei.config import ModelConfig
from ei.models.adapters.settings import new_parameter
from ei.models.vit import Backbone
from ei.models.vit_timm import TimmBackbone
from mor.roles import resolve, role_of


def rlrr(backbone: Backbone, config: ModelConfig) -> None:
    """All linear layers of the blocks are rescaled; norms and the patch embedding are scaled and shifted.

    The start is not the frozen backbone: scales are drawn, as in the method's public code. That code freezes scale
    and shift of the patch embedding; the parameter count of arXiv 2603.17514, Table 7, has them trained, and so are
    they here, unless ``config.scale_patches`` leaves them out.

    Raises:
        ValueError: the backbone is open_clip's own tower, whose attention is in other hands, or a parallel ViT.

    Source: RLRR (CVPR 2024).
    """
    vit = backbone.vit
    norms = [f"blocks.{block}.{norm}" for block in range(backbone.depth) for norm in ("norm1", "norm2")]
    if not isinstance(backbone, TimmBackbone) or not all(hasattr(block, "norm2") for block in vit.blocks):
        raise ValueError("adapter 'rlrr' needs a backbone from timm, with blocks of one attention, then one MLP")
    for name, role in role_of(vit, resolve(vit, "all")).items():
        vit.set_submodule(name, RescaledLinear(vit.get_submodule(name), packed=3 if role == "qkv" else 1))
    # timm keeps the final norm in one of two places, the other is the identity.
    final = "norm" if isinstance(vit.fc_norm, nn.Identity) else "fc_norm"
    for name in [*norms, final, *(["patch_embed"] if config.scale_patches else [])]:
        vit.set_submodule(name, ScaledShifted(vit.get_submodule(name), backbone.width))


class RescaledLinear(nn.Module):
    """A linear layer with ``W' = W + W * (s_row s_col)`` and ``b' = b + f``; W and b are those of ``base``.

    Attributes:
        row_scale: s_row, (O, 1).
        column_scale: s_col, (P, K), a row for each of P projections that are packed in W.
        shift: f, (O,).

    >>> import torch
    >>> layer = RescaledLinear(nn.Linear(4, 6), packed=3)
    >>> layer(torch.zeros(5, 4)).shape, sum(p.numel() for p in (layer.row_scale, layer.column_scale, layer.shift))
    (torch.Size([5, 6]), 24)
    """

    def __init__(self, base: nn.Linear, packed: int) -> None:
        super().__init__()
        # Not as a linear layer, so that its weights stay fp32 in training with bf16: they are rescaled before rounding.
        self.weight, self.bias = base.weight, base.bias
        outputs, inputs = base.weight.shape
        self.row_scale = new_parameter(outputs, 1, like=base.weight)
        self.column_scale = new_parameter(packed, inputs, like=base.weight)
        self.shift = new_parameter(outputs, like=base.weight)
        nn.init.kaiming_uniform_(self.row_scale)
        nn.init.kaiming_uniform_(self.column_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., O)."""
        row_scale = self.row_scale.view(len(self.column_scale), -1, 1)
        scale = (row_scale * self.column_scale[:, None]).view_as(self.weight)
        return F.linear(
            x, self.weight + self.weight * scale, self.shift if self.bias is None else self.bias + self.shift
        )


class ScaledShifted(nn.Module):
    """``base(x) * g + h``, with g from N(1, 0.02) and h from N(0, 0.02), each (D,)."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base
        like = next(base.parameters())
        self.scale, self.shift = new_parameter(width, like=like), new_parameter(width, like=like)
        nn.init.normal_(self.scale, mean=1.0, std=0.02)
        nn.init.normal_(self.shift, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale + self.shift
