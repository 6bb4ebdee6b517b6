"""The Vision Transformer below every model here: images in, one summary out, room for tokens from elsewhere.

What its libraries have in common; :mod:`ei.models.vit_timm` and :mod:`ei.models.vit_open_clip` hold the rest.

Shapes: N images, T tokens of an image, of which P are patches, n intervention tokens, D width; images are (N, 3, H, W).
"""

import copy
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ei.models.weights import misfit, read_weights

REQUIREMENT = "backbone must be a ViT with a class token and one convolution as patch embedding"

# What a file of weights may hold beyond the backbone: a head, DeiT's second one, CLIP's projection, MAE's decoder.
_BEYOND = re.compile(r"head\..*|head_dist\..*|proj|decoder_.*|mask_token")


class Backbone(nn.Module):
    """A Vision Transformer without its head, which takes in tokens from elsewhere.

    Attributes:
        vit: The library's model; its head is gone.
        width: D.
        depth: Number of blocks.
        image_size: Side of the images, in pixels.
        patch_size: Side of a patch. Where it does not divide ``image_size``, images are padded with zeros
            on the right and at the bottom (as timm's ``dynamic_img_pad`` does).
        prompts: (depth, p, D), tokens that are there during one block each, or None
            (:mod:`ei.models.adapters.vpt`).
        side: A network beside the blocks, which then keep nothing for gradients, or None
            (:mod:`ei.models.adapters.losa`).

    >>> from ei.models.vit_timm import load_tiny
    >>> load_tiny(image_size=32)(torch.zeros(2, 3, 32, 32), tokens=torch.zeros(2, 1, 64)).shape
    torch.Size([2, 64])
    """

    vit: Any
    prompts: nn.Parameter | None
    side: nn.Module | None

    def __init__(self, vit: nn.Module, *, width: int, depth: int, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.vit = vit
        self.width, self.depth = width, depth
        self.image_size, self.patch_size = image_size, patch_size
        self.register_parameter("prompts", None)
        self.register_module("side", None)
        self.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        *,
        tokens_at: int = 0,
        read_from: int | Sequence[int] = 0,
        added: Sequence[Tensor] = (),
        whole: bool = False,
    ) -> Tensor | list[Tensor]:
        """The CLS token after block ``read_from``, after the final norm.

        Args:
            images: (N, 3, image_size, image_size).
            tokens: (N, n, D), which join the image's own tokens for the rest of the way.
            token_mask: (N, n) bool, True for those of ``tokens`` that are seen; the result is as if the others were
                not there. None: all are.
            tokens_at: Block before which they join, from 0.
            read_from: Block after which the CLS token is read, from 1; 0 means the last. Of several blocks, it is
                read in one pass. Blocks after the last of them do not run.
            added: For the first block, the second and so on, what is added to the patch tokens before it,
                (N, P, D) or broadcast to that.
            whole: Read all tokens, not the CLS token alone; the last P are the patches.

        Returns:
            (N, D), or with ``whole`` (N, T, D); one for each of several blocks.

        Raises:
            ValueError: an argument does not fit the backbone, or ``tokens`` would join too late to be seen.

        Source: arXiv 2603.17514, section 3.2.
        """
        wanted = [read_from] if isinstance(read_from, int) else read_from
        for read in wanted:
            self.check_positions(tokens_at=tokens_at, read_from=read)
        reads = [read or self.depth for read in wanted]
        self._check_images(images)
        if tokens is not None:
            self._check_tokens(tokens, token_mask, len(images), tokens_at, min(reads))

        x = self._embed(self._pad(images))  # (N, T, D)
        seen = None  # (N, T) bool, once there is a token that is not to be seen
        change = None  # (N, T, D), what the network beside the blocks adds
        found: dict[int, Tensor] = {}
        for index in range(max(reads)):
            if tokens is not None and index == tokens_at:
                if token_mask is not None:
                    seen = self._insert(torch.ones_like(x[..., 0], dtype=torch.bool), token_mask)
                x = self._insert(x, tokens)
            if index < len(added):
                x = torch.cat([x[:, : -self.patches], x[:, -self.patches :] + added[index]], dim=1)
            x = self._through(index, x, seen)
            if self.side is not None:
                change = self.side(index, x, change)
            if index + 1 in reads:
                y = x if change is None else x + change
                found[index + 1] = self._final_norm(y if whole else y[:, 0])
        return found[reads[0]] if isinstance(read_from, int) else [found[read] for read in reads]

    def features(self, images: Tensor, added: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """The CLS token (N, D) and the patch map (N, P, D), row by row, both after the final norm.

        >>> from ei.models.vit_timm import load_tiny
        >>> [tuple(part.shape) for part in load_tiny(image_size=32).features(torch.zeros(2, 3, 32, 32))]
        [(2, 64), (2, 16, 64)]
        """
        x = self(images, added=added, whole=True)
        return x[:, 0], x[:, -self.patches :]

    def patch_tokens(self, images: Tensor) -> Tensor:
        """(N, P, D): the patches as the first block gets them, with their positions."""
        self._check_images(images)
        return self._embed(self._pad(images))[:, -self.patches :]

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return padded(self.image_size, self.patch_size) // self.patch_size

    @property
    def patches(self) -> int:
        """P."""
        return self.grid**2

    def check_positions(self, *, tokens_at: int = 0, read_from: int = 0) -> None:
        """Raise a ValueError if the backbone has no such block."""
        if not 0 <= tokens_at < self.depth:
            raise ValueError(f"tokens must enter before one of the ViT's blocks 0..{self.depth - 1}, got {tokens_at}")
        if not 0 <= read_from <= self.depth:
            raise ValueError(
                f"a summary must be read after one of the ViT's blocks 1..{self.depth}, or 0 for the last,"
                f" got {read_from}"
            )

    def fork(self) -> Self:
        """A second backbone with the same frozen tensors (the same objects) and copies of the trained ones.

        Frozen weights are held once, however many forks there are; each may then get adapters of its own.
        """
        tensors = chain(self.parameters(), self.buffers())
        # deepcopy takes what its memo already holds for an object's id as that object's copy.
        return copy.deepcopy(self, {id(tensor): tensor for tensor in tensors if not tensor.requires_grad})

    def load(self, weights: str) -> None:
        """Read a file into the backbone; position embeddings of another grid are resized (bicubic).

        Raises:
            ValueError: the file cannot be read or does not fit; missing, unexpected and mismatched names come
                in one message, and the backbone is left as it was.
        """
        self.vit.load_state_dict(self._fitting(read_weights(weights), weights))

    def require_fitting(self, weights: str) -> None:
        """Raise the ValueError that :meth:`load` would, as far as names and shapes tell; also on the meta device."""
        self._fitting(read_weights(weights), weights)

    def _fitting(self, given: dict[str, Tensor], weights: str) -> dict[str, Tensor]:
        """The tensors of a file as the backbone takes them."""
        try:
            state = self._translated(given)
        except Exception:  # a file of another model can fail anywhere; the comparison says how it differs
            state = given
        kept = {name: tensor for name, tensor in state.items() if not _BEYOND.fullmatch(name)}
        if problems := misfit(self.vit.state_dict(), kept):
            raise ValueError(f"weights {weights} do not fit the backbone: {problems}")
        return kept

    def _check_images(self, images: Tensor) -> None:
        size = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != size:
            raise ValueError(f"images must be (N, {', '.join(map(str, size))}), got {tuple(images.shape)}")

    def _check_tokens(
        self, tokens: Tensor, token_mask: Tensor | None, images: int, tokens_at: int, read_from: int
    ) -> None:
        if tokens.ndim != 3 or tokens.shape[0] != images or tokens.shape[2] != self.width:
            raise ValueError(f"tokens must be ({images}, n, {self.width}), got {tuple(tokens.shape)}")
        if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != tokens.shape[:2]):
            got = f"{tuple(token_mask.shape)} {token_mask.dtype}"
            raise ValueError(f"token_mask must be {tuple(tokens.shape[:2])} {torch.bool}, got {got}")
        if tokens_at >= read_from:
            raise ValueError(
                f"tokens must enter before the block after which the summary is read, but they enter"
                f" before block {tokens_at} (from 0) and it is read after block {read_from} (from 1)"
            )

    def _pad(self, images: Tensor) -> Tensor:
        margin = -self.image_size % self.patch_size
        return F.pad(images, (0, margin, 0, margin)) if margin else images

    @staticmethod
    def _insert(x: Tensor, tokens: Tensor) -> Tensor:
        # Positions are part of the embeddings, so attention does not care where a token stands. Right
        # after CLS, which the summary is read from, the rest keeps the order that its library gave it.
        return torch.cat([x[:, :1], tokens.to(x.dtype), x[:, 1:]], dim=1)

    def _through(self, index: int, x: Tensor, seen: Tensor | None) -> Tensor:
        """One block, with its prompts: (N, T, D) -> (N, T, D); attention sees the tokens that are ``seen``, or all."""
        block, count = self._blocks()[index], 0
        if self.prompts is not None:
            prompts = self.prompts[index].expand(len(x), -1, -1)
            count = prompts.shape[1]
            x = self._insert(x, prompts)
            seen = None if seen is None else self._insert(seen, seen.new_ones(len(x), count))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.side is None):
            x = block(x) if seen is None else self._masked(block, x, seen)
        return torch.cat([x[:, :1], x[:, 1 + count :]], dim=1) if count else x

    def _embed(self, images: Tensor) -> Tensor:
        """Everything before the first block: (N, 3, H, W) -> (N, T, D), CLS first."""
        raise NotImplementedError

    def token_count(self) -> int:
        """T: patches, the class token, and registers if there are any."""
        raise NotImplementedError

    def _blocks(self) -> Sequence[nn.Module]:
        raise NotImplementedError

    def _masked(self, block: Any, x: Tensor, seen: Tensor) -> Tensor:
        """``block(x)``, in which attention sees only the tokens that are ``seen``, (N, T) bool."""
        raise NotImplementedError

    def _final_norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _translated(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file under this backbone's names, position embeddings resized to its grid."""
        raise NotImplementedError

    def _same_patches(self, state: dict[str, Tensor]) -> bool:
        # The kernel of the patch embedding is a ViT's only tensor with four dimensions.
        return all(tensor.shape[-1] == self.patch_size for tensor in state.values() if tensor.ndim == 4)


@contextmanager
def published_weights_of(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with a download into one ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # the hub's client raises whatever its transport raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"cannot get the published weights of '{name}' ({reason}); pass --weights FILE or --no-pretrained"
        ) from error


def padded(image_size: int, patch_size: int) -> int:
    """The next multiple of ``patch_size``.

    >>> padded(512, 14)
    518
    """
    return math.ceil(image_size / patch_size) * patch_size


def near(name: str, names: Iterable[str]) -> str:
    """The end of an error message: which known names look like a misspelt one."""
    found = difflib.get_close_matches(name, list(names), n=3)
    return f"; near it are {', '.join(found)}" if found else ""
