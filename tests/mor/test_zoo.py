"""All models of the zoo; a few of them, one of each kind, in the default run."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from mor import inject

for library in ("timm", "open_clip", "transformers", "torchvision"):
    pytest.importorskip(library)

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)

FEW = [
    "timm vit_base_patch16_224",
    "timm vit_base_patch16_18x2_224",
    "timm vit_base_patch16_xp_224",
    "timm beit_base_patch16_224",
    "timm eva02_base_patch14_224",
    "timm swinv2_tiny_window8_256",
    "timm cait_xxs24_224",
    "timm nextvit_small",
    "open_clip CLIP",
    "open_clip custom",
    "transformers DINOv3, gated",
    "transformers Swin",
    "transformers Swinv2",
    "torchvision ViT",
    "torchvision SwinV2",
    "torch TransformerEncoder",
]
MODELS = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in zoo.ZOO]


def written() -> dict[str, str]:
    lines = zoo.DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in rows[1:]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_lives(name):
    row = zoo.examine(name)
    assert zoo.table_row(name, row) == written()[name], "docs/zoo.md is not what the code finds; run `make zoo`"


def test_the_document_has_all_models():
    assert len(zoo.ZOO) >= 60 and set(FEW) <= set(zoo.ZOO)
    assert list(written()) == list(zoo.ZOO)
    assert zoo.DOCUMENT.read_text(encoding="utf-8").startswith(zoo.HEADER)


@pytest.mark.filterwarnings("ignore")
def test_an_unsupported_module_anywhere_leaves_the_model_untouched():
    """Beside a model that could be adapted stands one that could not; both stay what they were."""

    class Subclass(nn.MultiheadAttention):
        pass

    for name in ("timm beit_base_patch16_224", "open_clip CLIP", "torchvision Swin", "torch TransformerEncoder"):
        model = nn.ModuleDict({"good": zoo.build(name)[0], "bad": nn.ModuleDict({"attn": Subclass(8, 2)})})
        model = nn.ModuleDict({"model": model, "blocks": nn.Sequential(model["bad"])})
        before = zoo.state_of(model)
        with pytest.raises(ValueError, match=r"blocks.0.attn.in_proj.*: Subclass is a MultiheadAttention"):
            inject(model, "qkv")
        assert zoo.state_of(model) == before


def test_the_zoo_sees_a_dead_adapter(monkeypatch):
    """Were the hosts not changed, it would say so."""
    monkeypatch.setattr("mor.injection.prepare", lambda model, names: ())
    with pytest.raises(ValueError, match="not called in training: blocks.0.attn.qkv"):
        zoo.examine("timm beit_base_patch16_224")
    assert torch.is_grad_enabled()
