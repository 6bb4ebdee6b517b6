"""torchvision's shifted-window attention (Swin, SwinV2), calling ``qkv`` and ``proj`` so that they can be adapted.

Shapes: B batch, Y x X map of tokens, D width, H heads, W tokens in a window.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class CallingShiftedWindowAttention(ShiftedWindowAttention):
    """The same attention, with ``qkv`` and ``proj`` called; :mod:`mor.hosts` gives it this class."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, D) -> (B, Y, X, D)."""
        return _attend(self, x)


class CallingShiftedWindowAttentionV2(ShiftedWindowAttentionV2):
    """The same attention, with ``qkv`` and ``proj`` called; :mod:`mor.hosts` gives it this class."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, D) -> (B, Y, X, D)."""
        return _attend(self, x)


def _attend(attention: ShiftedWindowAttention, x: Tensor) -> Tensor:
    height, width = x.shape[1:3]
    window = attention.window_size
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    size = x.shape[1:3]
    # One window that holds everything has nowhere to shift to.
    shift = [0 if window[i] >= size[i] else attention.shift_size[i] for i in range(2)]
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    windows = _split(x, window)  # (B, n, W, D)

    qkv = attention.qkv(windows)
    is_v2 = isinstance(attention, ShiftedWindowAttentionV2)
    if is_v2 and attention.qkv.bias is not None:
        # SwinV2 has no bias on its keys, whatever the layer's says.
        _, of_keys, _ = attention.qkv.bias.chunk(3)
        qkv = qkv - F.pad(of_keys, (len(of_keys), len(of_keys)))
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (B, n, H, W, D / H)
    if is_v2:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        logits = q @ k.transpose(-2, -1) * attention.logit_scale.clamp(max=math.log(100)).exp()
    else:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = logits + attention.get_relative_position_bias()  # (1, H, W, W)
    if any(shift):
        logits = logits + _mask(size, window, shift, logits)

    weights = F.dropout(logits.softmax(-1), attention.attention_dropout, attention.training)
    y = attention.proj((weights @ v).transpose(2, 3).flatten(3))
    y = F.dropout(y, attention.dropout, attention.training)
    y = _join(y, size, window).roll((shift[0], shift[1]), (1, 2))
    return y[:, :height, :width].contiguous()


def _split(x: Tensor, window: list[int]) -> Tensor:
    """(B, Y, X, D) -> (B, n, W, D)."""
    return x.unflatten(1, (-1, window[0])).unflatten(3, (-1, window[1])).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _join(x: Tensor, size: tuple[int, ...], window: list[int]) -> Tensor:
    """(B, n, W, D) -> (B, Y, X, D)."""
    rows, columns = size[0] // window[0], size[1] // window[1]
    x = x.unflatten(1, (rows, columns)).unflatten(3, (window[0], window[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _mask(size: tuple[int, ...], window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """What the shift brought together from opposite borders does not see each other: (n, 1, W, W)."""
    regions = []
    for i in range(2):
        position = torch.arange(size[i], device=like.device)
        cut = (position >= size[i] - window[i]).int() + (position >= size[i] - shift[i]).int()
        regions.append(cut if shift[i] else torch.zeros_like(cut))
    region = regions[0][:, None] * 3 + regions[1]
    region = _split(region[None, :, :, None], window)[0, :, :, 0]  # (n, W)
    apart = region[:, None, :, None] != region[:, None, None, :]
    return torch.where(apart, -100.0, 0.0).to(like.dtype)
