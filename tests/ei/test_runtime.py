import pytest
import torch
from torch import nn

from ei.runtime import arithmetic, choose_device, fingerprint, same_weights, seed_everything


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
