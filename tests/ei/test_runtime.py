import pytest
import torch
from torch import nn

from ei.config import ModelConfig
from ei.models.backbone import adapted, load_backbone
from ei.runtime import arithmetic, choose_device, fingerprint, narrow_frozen, same_weights, seed_everything


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here"):
            choose_device(name)


def test_seed():
    seed_everything(5)
    first = torch.rand(3)
    seed_everything(5)
    assert torch.equal(torch.rand(3), first)


def test_arithmetic():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with arithmetic(torch.device("cpu"), "bf16"):
        assert layer(x).dtype == torch.bfloat16
    with arithmetic(torch.device("cpu"), "fp32"):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny", "open_clip:ViT-B-16"])
def test_frozen_weights_held_in_bf16_give_the_same_bits(name, monkeypatch):
    if name != "tiny":
        open_clip = pytest.importorskip("open_clip")
        small = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16}}
        small["vision_cfg"]["head_width"], small["text_cfg"] = 16, {"width": 16, "heads": 2, "layers": 1}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", small)
    config = ModelConfig(backbone=name, pretrained=False)
    images = torch.randn(3, 3, 32, 32)
    found = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        backbone = adapted(load_backbone(config, 32), config)
        narrow_frozen(backbone, precision)
        narrow = {p.dtype for p in backbone.parameters() if p.ndim == 2 and not p.requires_grad}
        assert (torch.bfloat16 in narrow) == (precision == "bf16")
        assert all(p.dtype == torch.float32 for p in backbone.parameters() if p.requires_grad)
        for p in backbone.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        with arithmetic(torch.device("cpu"), "bf16"):
            y = backbone(images)
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad for p in backbone.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_trained_weights_stay_wide():
    layer = nn.Linear(2, 2)
    narrow_frozen(layer, "bf16")
    assert layer.weight.dtype == torch.float32


def test_the_fingerprint_is_of_what_is_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    before = fingerprint(model)
    nn.init.ones_(model[0].bias)  # trained
    assert fingerprint(model) == before
    model[1].running_mean += 1
    assert fingerprint(model) != before
    model[1].running_mean -= 1
    assert fingerprint(model) == before
    with torch.no_grad():
        model[0].weight += 1e-3
    assert not same_weights(fingerprint(model), before)


def test_fingerprints_forgive_rounding_and_nothing_else():
    """Resized embeddings and random weights differ in the last bits between processors."""
    torch.manual_seed(1)
    frozen = nn.Linear(64, 64).requires_grad_(False)
    before = fingerprint(frozen)
    with torch.no_grad():
        frozen.weight *= 1 + 1e-7
    assert fingerprint(frozen) != before and same_weights(fingerprint(frozen), before)
    assert not same_weights(fingerprint(nn.Linear(64, 64).requires_grad_(False)), before)
    assert not same_weights(fingerprint(nn.Linear(64, 64, bias=False).requires_grad_(False)), before)
