"""What a model costs: its parameters, and the arithmetic of one prediction."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ei.config import Config
from ei.data.sample import Batch
from ei.models import count_trainable
from ei.models.output import Classifier
from mor import MoRLinear


def measure_cost(model: nn.Module, config: Config) -> dict[str, Any]:
    """Parameters and floating-point operations, ready for JSON.

    Returns:
        ``trained``: parameters by part, and in total (:func:`ei.models.count_trainable`); ``frozen``: the others,
        those that branches share counted once; ``flops``: see :func:`forward_flops`.
    """
    assert isinstance(model, Classifier)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return {"trained": count_trainable(model), "frozen": frozen, "flops": forward_flops(model, config)}


@torch.no_grad()
def forward_flops(model: nn.Module, config: Config) -> int:
    """Floating-point operations of predicting one sample with one image per modality.

    Those of matrix products, attention and convolutions, a multiplication and an addition each; adapters included.
    One such prediction is computed on the model's device to count them.

    >>> from ei.config import DataConfig, ModelConfig
    >>> from ei.models import build_model
    >>> config = Config(data=DataConfig(modalities=("a", "b"), image_size=8), model=ModelConfig(backbone="tiny"))
    >>> forward_flops(build_model(config, num_classes=4).eval(), config)
    34812416
    """
    device = next(model.parameters()).device
    side, modalities = config.data.image_size, config.data.modalities
    batch = Batch(
        images={modality: torch.zeros(1, 1, 3, side, side, device=device) for modality in modalities},
        present={modality: torch.ones(1, 1, dtype=torch.bool, device=device) for modality in modalities},
        ids=["zeros"],
    )
    with _only_countable_kernels(model), FlopCounterMode(display=False) as counter:
        model(batch)
    return counter.get_total_flops()


@contextmanager
def _only_countable_kernels(model: nn.Module) -> Iterator[None]:
    """No operators that the counter has no formula for: our kernels, in-place products, torch's fused attention."""
    layers = [layer for layer in model.modules() if isinstance(layer, MoRLinear)]
    backends = [layer.backend for layer in layers]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        for layer in layers:
            layer.backend = "eager"
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend
