"""MMRAD: frozen ViTs with prompts made from the image, and SAM's two-way transformer between the modalities.

Shapes: B batch, M modalities, P patches, D width, N images, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ei.baselines.fusion_model import FusionModel, require_divided
from ei.config import BaselineConfig
from ei.data.sample import Batch
from ei.models.backbone import Backbone
from ei.models.fusion import module_key
from ei.models.output import Output


class MMRAD(FusionModel):
    """``logits`` is the mean over targets t of ``head(task token of decoder([task; F_t], F_others))``.

    Each modality that is there is the target in turn, its patches with a learned task token the queries, the patches of
    the others the keys; one decoder and one head for all. A target without others gets its own patches as keys. Prompts
    are :class:`PromptNet`; the paper has them on frozen ViTs, and MMRAD-MoR has adapters in their place.

    Raises:
        ImportError: transformers, which has the decoder, is not installed.
        ValueError: the heads do not divide the width.

    Source: Information Fusion 113 (2025) 102631. Its code is not public: prompts and depth are the smallest that give
    the number of parameters that arXiv 2603.17514 prints.
    """

    def __init__(
        self, modalities: Sequence[str], fresh: Callable[[], Backbone], num_classes: int, settings: BaselineConfig
    ) -> None:
        super().__init__(modalities, fresh)
        # That between modalities has half the width of that within one.
        require_divided(self.width // 2, "mmrad_heads", settings.mmrad_heads)
        self.fusion = Decoder(self.width, settings)
        self.head = nn.Linear(self.width, num_classes)
        width = settings.mmrad_prompt_width
        prompted = modalities if settings.mmrad_prompts else ()
        self.prompts = nn.ModuleDict(
            {module_key(name): PromptNet(self.encoder(name).backbone, width) for name in prompted}
        )

    def maps(self, batch: Batch) -> Tensor:
        return torch.stack([self.encoder(name).maps(batch, self._prompts(name)) for name in self.modalities], dim=1)

    def forward(self, batch: Batch) -> Output:
        has = batch.has_each(self.modalities)
        maps = self.maps(batch)  # (B, M, P, D)
        # Not to be seen is not to be there: the decoder has no mask for all of its attentions, so samples with the same
        # modalities go through it together.
        task = maps.new_zeros(len(maps), self.width)
        for pattern in has.unique(dim=0):
            rows = (has == pattern).all(1).nonzero()[:, 0]
            own = pattern.nonzero()[:, 0].tolist()
            tokens = [
                self.fusion(maps[rows, target], maps[rows][:, [m for m in own if m != target] or own].flatten(1, 2))
                for target in own
            ]
            task = task.index_copy(0, rows, torch.stack(tokens).mean(0).to(task.dtype))
        return Output(self.head(task))

    def parts(self) -> dict[str, list[nn.Module]]:
        return super().parts() | {"prompts": [self.prompts]}

    def _prompts(self, modality: str) -> "PromptNet | None":
        if not self.prompts:
            return None
        net = self.prompts[module_key(modality)]
        assert isinstance(net, PromptNet)
        return net


class Decoder(nn.Module):
    """SAM's two-way transformer with a task token: (B, P, D) of the target, (B, n, D) of the others -> (B, D)."""

    def __init__(self, width: int, settings: BaselineConfig) -> None:
        super().__init__()
        try:
            # Here, because it takes seconds, and only this method needs it.
            from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
            from transformers.models.sam.modeling_sam import SamTwoWayTransformer
        except ModuleNotFoundError as error:
            raise ImportError(
                f"fusion 'mmrad' needs '{error.name}': pip install 'mixture-of-ranks[peft]' brings it"
            ) from error
        self.task = nn.Parameter(torch.empty(width).normal_(std=0.02))
        options: dict[str, Any] = {
            "hidden_size": width,
            "mlp_dim": settings.mmrad_mlp,
            "num_hidden_layers": settings.mmrad_depth,
            "num_attention_heads": settings.mmrad_heads,
            "attn_implementation": "sdpa",
        }
        self.transformer = SamTwoWayTransformer(SamMaskDecoderConfig(**options))

    def forward(self, target: Tensor, others: Tensor) -> Tensor:
        queries = torch.cat([self.task.expand(len(target), 1, -1), target], dim=1)[:, None]
        keys = others.mT[..., None]  # the transformer expects a map (B, D, height, width)
        # The ViTs' tokens know their positions.
        told, _ = self.transformer(queries, keys, torch.zeros_like(keys), attention_similarity=None)
        return told[:, 0, 0]


class PromptNet(nn.Module):
    """Prompts for the patches of an image before each block: ``p_l = up(gelu(W_l patches(image)))``.

    Args:
        backbone: Whose blocks, patches and width they are for.
        width: Of the patches here, and of the W_l; ``up`` is one for all blocks.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        self.margin = -backbone.image_size % backbone.patch_size
        self.patches = nn.Conv2d(3, width, backbone.patch_size, stride=backbone.patch_size)
        self.of_block = nn.ModuleList([nn.Linear(width, width) for _ in range(backbone.depth)])
        self.up = nn.Linear(width, backbone.width)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> (N, P, D) for each block."""
        patches = self.patches(F.pad(images, (0, self.margin, 0, self.margin))).flatten(2).mT
        return [self.up(F.gelu(layer(patches))) for layer in self.of_block]
