"""Small models and batches; 'tiny' on 8 x 8 px has 16 patches of 2 x 2, 4 blocks and width 64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ei.config import Config, DataConfig, ModelConfig
from ei.data.sample import Batch, Sample, collate
from ei.models.backbone import load_backbone
from ei.models.vit import Backbone

SIDE = 8
MODALITIES = ("cfp", "oct")


@pytest.fixture
def trunk() -> Backbone:
    return load_backbone(ModelConfig(backbone="tiny"), SIDE)


@pytest.fixture
def make_config() -> Callable[..., Config]:
    def make(modalities: Sequence[str] = MODALITIES, **model: Any) -> Config:
        data = DataConfig(modalities=tuple(modalities), image_size=SIDE)
        return Config(data=data, model=ModelConfig(**{"backbone": "tiny", **model}))

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(seed: int = 0, **images: Sequence[int]) -> Batch:
        """``oct=(2, 1)``: two samples with two images and one image of modality 'oct'."""
        generator = torch.Generator().manual_seed(seed)
        counts = images or {"cfp": (1, 2, 1), "oct": (3, 1, 2)}
        samples = [
            Sample(
                id=f"patient-{row}",
                images={
                    name: torch.randn(each[row], 3, SIDE, SIDE, generator=generator) for name, each in counts.items()
                },
            )
            for row in range(len(next(iter(counts.values()))))
        ]
        return collate(samples)

    return make


@pytest.fixture
def wake() -> Callable[[nn.Module], None]:
    """B = 0 blocks the gradient of everything else in an adapter; training soon ends that, and so does this."""

    def randomise(model: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mor_B"):
                    parameter.normal_(std=0.2)

    return randomise


@pytest.fixture
def gradient_of() -> Callable[[Tensor, nn.Module], float]:
    """Largest gradient that a loss gives to a module's trained parameters; 0 if it does not depend on them."""

    def largest(loss: Tensor, module: nn.Module) -> float:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return max(0.0 if gradient is None else float(gradient.abs().max()) for gradient in gradients)

    return largest
