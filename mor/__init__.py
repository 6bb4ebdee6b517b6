"""Mixture-of-Ranks adapters for Vision Transformers: inject them, train, save, load, take them out."""

from mor.checkpoint import load, save
from mor.config import MoRConfig
from mor.functional import mor_linear
from mor.gates import record_gates
from mor.injection import disabled, eject, inject, trainable_parameters
from mor.inspection import check, preview
from mor.layer import MoRLinear
from mor.lora_export import to_lora
from mor.registration import register_with_peft

__all__ = [
    "MoRConfig",
    "MoRLinear",
    "check",
    "disabled",
    "eject",
    "inject",
    "load",
    "mor_linear",
    "preview",
    "record_gates",
    "register_with_peft",
    "save",
    "to_lora",
    "trainable_parameters",
]
