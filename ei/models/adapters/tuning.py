"""Training what the backbone has already: nothing of it, all of it, or its biases."""

from collections.abc import Callable

from torch import nn

from ei.config import ModelConfig
from ei.models.vit import Backbone


def frozen(backbone: Backbone, config: ModelConfig) -> None:
    """The backbone as it is; with the head that follows, a linear probe."""


def full(backbone: Backbone, config: ModelConfig) -> None:
    """Everything is trained, position embeddings included."""
    _train(backbone, lambda name: True)


def bitfit(backbone: Backbone, config: ModelConfig) -> None:
    """Every bias is trained: of linear layers, norms and the patch embedding.

    Source: arXiv 2106.10199.
    """
    _train(backbone, lambda name: name.endswith("bias"))


def _train(backbone: Backbone, wanted: Callable[[str], bool]) -> None:
    # A copy takes the place of each: the tensor that is there belongs to the trunk and to all of its forks.
    for name, parameter in list(backbone.named_parameters()):
        if wanted(name):
            owner, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(owner), attribute, nn.Parameter(parameter.detach().clone()))
