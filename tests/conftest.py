"""What every test shares: no network, a fixed seed, and a small Vision Transformer."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported; without a card its interpreter runs the kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vit() -> nn.Module:
    """A timm Vision Transformer: 3 blocks of width 32 on 16 x 16 px, 4 patches and a class token."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    ).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from one test to the next, nor in the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
