"""torchvision's shifted-window attention (Swin, SwinV2, video Swin), calling ``qkv`` and ``proj`` for their adapters.

Shapes: B batch, T x Y x X map of tokens (T in videos only), D width, H heads, n windows, W tokens in a window.
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d


class CallingShiftedWindowAttention(ShiftedWindowAttention):
    """The same attention, with ``qkv`` and ``proj`` called; :mod:`mor.hosts` gives it this class."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, D) -> (B, Y, X, D)."""
        return _attend(self, x, self.window_size, self.get_relative_position_bias())


class CallingShiftedWindowAttentionV2(ShiftedWindowAttentionV2):
    """The same attention, with ``qkv`` and ``proj`` called; :mod:`mor.hosts` gives it this class."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, D) -> (B, Y, X, D)."""
        return _attend(self, x, self.window_size, self.get_relative_position_bias())


class CallingShiftedWindowAttention3d(ShiftedWindowAttention3d):
    """The same attention, with ``qkv`` and ``proj`` called; :mod:`mor.hosts` gives it this class."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, Y, X, D) -> (B, T, Y, X, D)."""
        window = [min(sides) for sides in zip(self.window_size, x.shape[1:-1], strict=True)]
        return _attend(self, x, window, self.get_relative_position_bias(window))


def _attend(
    attention: ShiftedWindowAttention | ShiftedWindowAttention3d, x: Tensor, window: Sequence[int], bias: Tensor
) -> Tensor:
    """Attention within each window of the map; bias is (1, H, W, W)."""
    unpadded = x.shape[1:-1]
    x = F.pad(x, (0, 0, *chain(*((0, -unpadded[i] % window[i]) for i in reversed(range(len(window)))))))
    size = x.shape[1:-1]
    # One window that holds everything has nowhere to shift to.
    shift = [0 if window[i] >= size[i] else attention.shift_size[i] for i in range(len(window))]
    sides = list(range(1, len(window) + 1))
    x = x.roll([-s for s in shift], sides)
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
    logits = logits + bias
    if any(shift):
        logits = logits + _mask(size, window, shift, logits)

    weights = F.dropout(logits.softmax(-1), attention.attention_dropout, attention.training)
    y = attention.proj((weights @ v).transpose(2, 3).flatten(3))
    y = F.dropout(y, attention.dropout, attention.training)
    y = _join(y, size, window).roll(shift, sides)
    for side, length in zip(sides, unpadded, strict=True):
        y = y.narrow(side, 0, length)
    return y.contiguous()


def _split(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, T, Y, X, D) -> (B, n, W, D)."""
    count = len(window)
    for i in range(count):
        x = x.unflatten(1 + 2 * i, (-1, window[i]))
    x = x.permute(0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2), 2 * count + 1)
    return x.flatten(count + 1, 2 * count).flatten(1, count)


def _join(x: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """(B, n, W, D) -> (B, T, Y, X, D)."""
    count = len(window)
    x = x.unflatten(2, tuple(window)).unflatten(1, tuple(size[i] // window[i] for i in range(count)))
    x = x.permute(0, *chain(*((1 + i, 1 + count + i) for i in range(count))), 2 * count + 1)
    for side in range(1, count + 1):
        x = x.flatten(side, side + 1)
    return x


def _mask(size: Sequence[int], window: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
    """What the shift brought together from opposite borders does not see each other: (n, 1, W, W)."""
    region = torch.zeros((), dtype=torch.int, device=like.device)
    for i in range(len(size)):
        position = torch.arange(size[i], device=like.device)
        along = (position >= size[i] - window[i]).int() + (position >= size[i] - shift[i]).int()
        region = region[..., None] * 3 + along
    region = _split(region[None, ..., None], window)[0, :, :, 0]  # (n, W)
    apart = region[:, None, :, None] != region[:, None, None, :]
    return torch.where(apart, -100.0, 0.0).to(like.dtype)
