"""Early Intervention: classify patients with two or more imaging modalities, on a frozen Vision Transformer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ei.config import Config, DataConfig, ModelConfig, TrainConfig
    from ei.evaluation import evaluate
    from ei.models import build_model
    from ei.piecewise import predict
    from ei.runs import load
    from ei.training import train

# Loaded on first use: the command line must answer before torch could be imported.
_HOMES = {
    "Config": "ei.config",
    "DataConfig": "ei.config",
    "ModelConfig": "ei.config",
    "TrainConfig": "ei.config",
    "build_model": "ei.models",
    "evaluate": "ei.evaluation",
    "load": "ei.runs",
    "predict": "ei.piecewise",
    "train": "ei.training",
}

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainConfig",
    "build_model",
    "evaluate",
    "load",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ei' has no attribute '{name}'")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise explain_missing(error) from error


def explain_missing(error: ModuleNotFoundError) -> ImportError:
    """What to install, unless it is a module of this package that is missing."""
    if (error.name or "ei").split(".")[0] == "ei":
        return error
    return ImportError(f"ei needs '{error.name}', which comes with its extra: pip install 'mixture-of-ranks[ei]'")
