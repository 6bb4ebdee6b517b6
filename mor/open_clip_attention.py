"""open_clip's own attention, of blocks of type "custom", calling ``in_proj`` so that it can be adapted.

Shapes: B batch, N tokens, D width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from torch import Tensor, nn


class CallingAttention(Attention):
    """The same attention, with ``in_proj`` called as a module; :mod:`mor.hosts` gives it this class."""

    in_proj: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); attn_mask is boolean (True: not seen) or added, (N, N) or (B * H, N, N)."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D / H)
        mask = None if attn_mask is None else self._mask(attn_mask, q)
        dropout = self.attn_drop.p if self.training else 0.0
        if self.logit_scale is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            scale = self.logit_scale.clamp(max=self.logit_scale_max).exp()  # (H, 1, 1)
            x = F.scaled_dot_product_attention(q * scale, k, v, mask, dropout, scale=1.0)
        else:
            x = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, mask, dropout)
        if self.head_scale is not None:
            x = x * self.head_scale
        x = self.ln_inner(x.transpose(1, 2).flatten(2))
        return self.out_drop(self.out_proj(x))

    def _mask(self, mask: Tensor, q: Tensor) -> Tensor:
        if mask.ndim == 3:
            mask = mask.unflatten(0, (len(q), self.num_heads))
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill_(mask, -math.inf)
        return mask.to(q.dtype)
