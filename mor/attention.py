"""nn.MultiheadAttention that calls its projections, so that they can be adapted.

Shapes: B batch, L queries, S keys, D width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CallingMultiheadAttention(nn.MultiheadAttention):
    """The same attention, with ``in_proj`` (or ``q_proj``, ``k_proj``, ``v_proj``) and ``out_proj`` called as modules.

    Never constructed: :mod:`mor.hosts` gives this class to an nn.MultiheadAttention and adds the projections, which
    borrow its parameters. The parameters keep their names, and other code that reads them finds the frozen ones.
    """

    in_proj: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's, without nested tensors."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("an adapted nn.MultiheadAttention takes no nested tensors; pad them and pass a mask")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal: attn_mask is needed, got None")
        is_batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not is_batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))

        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L or S, D / H)

        # Alone, a causal mask need not be read.
        causal_alone = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal_alone else self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)  # (B, H, L, S)
            x = weights @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal_alone)
        # In memory as torch's: outside its fast path, the queries are outermost.
        batch_outermost = self._has_fast_path(query, key, value, attn_mask, key_padding_mask)
        x = x.permute(0, 2, 1, 3) if batch_outermost else x.permute(2, 0, 1, 3)
        x = self.out_proj(x.flatten(2).contiguous())  # (B, L, D) or (L, B, D)

        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return x.squeeze(1), None if weights is None else weights.squeeze(0)
        return x if batch_outermost or not self.batch_first else x.transpose(0, 1), weights

    def _has_fast_path(self, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> bool:
        """Whether nn.MultiheadAttention would hand everything to one kernel, whose output is batch first in memory."""
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, *self.parameters()))
        return (
            not (self.training or trains or torch.is_autocast_enabled())
            and torch.backends.mha.get_fastpath_enabled()
            and (self.batch_first and query.dim() == 3 and query is key is value)
            and (self.in_proj_weight is not None and self.in_proj_bias is not None)
            and not (self.num_heads % 2 or self.bias_k is not None or self.add_zero_attn)
            and not any(mask is not None and mask.is_floating_point() for mask in masks)
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not self._qkv_same_embed_dim:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if key is value:
            if query is key:
                return self.in_proj(query).chunk(3, -1)
            return self.in_proj(query).chunk(3, -1)[0], *self.in_proj(key).chunk(3, -1)[1:]
        # The gates of a token are those of the whole layer, so each input goes through all of it.
        return tuple(self.in_proj(x).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the logits, (B or 1, H or 1, L, S)."""
        masks = []
        added = k.shape[2] - (0 if attn_mask is None else attn_mask.shape[-1])
        if attn_mask is not None:
            mask = F.pad(_additive("attn_mask", attn_mask, q.dtype), (0, added))
            masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            added = k.shape[2] - key_padding_mask.shape[-1]
            masks.append(F.pad(_additive("key_padding_mask", key_padding_mask, q.dtype), (0, added))[:, None, None])
        return sum(masks[1:], masks[0]) if masks else None


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be of bool or a floating-point type, got {mask.dtype}")
    return mask.to(dtype)
