"""Small baselines and batches; 'tiny' on 8 x 8 px has 16 patches of 2 x 2, 4 blocks and width 64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ei.config import BaselineConfig, Config, DataConfig, ModelConfig
from ei.data.sample import Batch, Sample, collate
from ei.models import Backbone, Classifier, build_model, load_backbone

SIDE = 8
SMALL: dict[str, dict[str, Any]] = {
    "mm-mil": {"mil_heads": 2, "mil_hidden": 8},
    "sfusion": {"sfusion_layers": 1, "sfusion_heads": 2, "sfusion_grid": 2, "sfusion_dropout": 0.0},
    "raddiag": {"raddiag_slices": 4, "raddiag_table": 4},
    "dynmm": {"dynmm_hidden": 8},
    "mmrad": {"mmrad_heads": 2, "mmrad_mlp": 16, "mmrad_prompt_width": 8},
    "unimodel": {"unimodel_embeddings": True},
    "early": {"early_hidden": (16,)},
    "late-learned": {"learned_hidden": 8},
    "cross": {"cross_width": 16, "cross_heads": 2},
    "joint": {"joint_width": 16},
}


@pytest.fixture(scope="session")
def small() -> dict[str, dict[str, Any]]:
    """Settings that make each fusion fast."""
    return SMALL


@pytest.fixture
def build() -> Callable[..., Classifier]:
    def make(
        fusion: str, modalities: Sequence[str] = ("cfp", "oct"), adapter: str = "mor", **settings: Any
    ) -> Classifier:
        """With adapters as training soon makes them: B = 0 would block the gradient of everything else in them."""
        config = Config(
            data=DataConfig(modalities=tuple(modalities), image_size=SIDE),
            model=ModelConfig(backbone="tiny", fusion=fusion, adapter=adapter),
            baseline=BaselineConfig(**{**SMALL.get(fusion, {}), **settings}),
        )
        model = build_model(config, 4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mor_B"):
                    parameter.normal_(std=0.2)
        return model

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(seed: int = 0, **images: Sequence[int]) -> Batch:
        """``oct=(2, 0)``: a sample with two images of modality 'oct' and one with none; labels 0, 1, 2, 3, 0, .."""
        generator = torch.Generator().manual_seed(seed)
        count = len(next(iter(images.values())))
        return collate(
            [
                Sample(
                    id=f"patient-{row}",
                    images={
                        name: torch.randn(each[row], 3, SIDE, SIDE, generator=generator)
                        for name, each in images.items()
                    },
                    label=torch.tensor(row % 4),
                )
                for row in range(count)
            ]
        )

    return make


@pytest.fixture
def trunk_of() -> Callable[[int], Backbone]:
    """A tiny backbone for images of a size."""
    return lambda size: load_backbone(ModelConfig(backbone="tiny"), size)
