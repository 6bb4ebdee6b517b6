"""Early Intervention: classify patients with two or more imaging modalities, on a frozen Vision Transformer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ei.config import BaselineConfig, Config, DataConfig, ModelConfig, TrainConfig
    from ei.evaluation.evaluate import evaluate
    from ei.evaluation.piecewise import predict
    from ei.models import build_model
    from ei.runs.loading import load
    from ei.training import train

# Loaded on first use: the command line must answer before torch could be imported.
_HOMES = {
    "BaselineConfig": "ei.config",
    "Config": "ei.config",
    "DataConfig": "ei.config",
    "ModelConfig": "ei.config",
    "TrainConfig": "ei.config",
    "build_model": "ei.models",
    "evaluate": "ei.evaluation.evaluate",
    "load": "ei.runs.loading",
    "predict": "ei.evaluation.piecewise",
    "train": "ei.training",
}

__all__ = [
    "BaselineConfig",
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
