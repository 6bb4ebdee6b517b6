"""How many parameters of a model are trained, and in which of its parts."""

from typing import Protocol

from torch import nn


class HasParts(Protocol):
    """A model that can name its parts, each a list of its modules."""

    def parts(self) -> dict[str, list[nn.Module]]: ...


def count_trainable(model: HasParts) -> dict[str, int]:
    """Trained parameters by part, and under 'total' in all; a parameter that is shared counts once.

    Works on the meta device, where a model has shapes but no weights.

    >>> from ei.config import Config, DataConfig, ModelConfig
    >>> from ei.models import build_model
    >>> config = Config(data=DataConfig(modalities=("cfp", "oct")), model=ModelConfig(backbone="tiny"))
    >>> count_trainable(build_model(config, num_classes=4))["fusion"]
    258
    """
    seen: set[int] = set()
    counts = {part: sum(_count(module, seen) for module in modules) for part, modules in model.parts().items()}
    return counts | {"total": sum(counts.values())}


def _count(module: nn.Module, seen: set[int]) -> int:
    new = [item for item in module.parameters() if item.requires_grad and id(item) not in seen]
    seen.update(map(id, new))
    return sum(parameter.numel() for parameter in new)
