"""Training what the backbone has already."""

import torch

import mor
from ei.config import ModelConfig
from ei.models.backbone import adapted, load_backbone


def test_bitfit_takes_every_bias_there_is() -> None:
    """Of the patch embedding and the norm before the blocks too, where there are any, and of nothing but the ViT."""
    for name in ("vit_base_patch16_clip_224.openai", "vit_base_patch14_reg4_dinov2.lvd142m", "open_clip:ViT-B-16"):
        config = ModelConfig(adapter="bitfit", backbone=name, pretrained=False)
        with torch.device("meta"):
            trunk = load_backbone(config, 224)
            learning = mor.trainable_parameters(adapted(trunk, config))
        assert list(learning) == [name for name, _ in trunk.named_parameters() if name.endswith("bias")]
        assert sum(parameter.numel() for parameter in learning.values()) == 102_912
