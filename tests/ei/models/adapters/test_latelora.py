"""LateLoRA: LoRA on q and v of the later blocks."""

import pytest
import torch
from torch import nn

from ei.config import ModelConfig
from ei.models.adapters.latelora import QVLoRA
from ei.models.backbone import adapted
from ei.models.vit import Backbone


def test_q_and_v_are_adapted_and_k_is_not() -> None:
    base = nn.Linear(8, 24)
    layer, x = QVLoRA(base, rank=2), torch.randn(5, 8)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    q, k, v = base(x).chunk(3, dim=1)
    (A_q, A_v), (B_q, B_v) = layer.lora_A, layer.lora_B
    torch.testing.assert_close(layer(x), torch.cat([q + x @ (B_q @ A_q).T, k, v + x @ (B_v @ A_v).T], dim=1))
    assert torch.equal(layer(x).chunk(3, dim=1)[1], k)


def test_a_starts_as_loras() -> None:
    """kaiming_uniform(a=sqrt(5)): within 1 / sqrt(K), and as wide."""
    A = QVLoRA(nn.Linear(64, 192), rank=32).lora_A
    assert 0.99 / 8 < A.abs().max() <= 1 / 8


@pytest.mark.parametrize(("blocks", "adapted_blocks"), [((), [2, 3]), ((3, 0), [0, 3])])
def test_blocks(trunk: Backbone, blocks: tuple[int, ...], adapted_blocks: list[int]) -> None:
    backbone = adapted(trunk, ModelConfig(adapter="latelora", blocks=blocks))
    found = [index for index, block in enumerate(backbone.vit.blocks) if isinstance(block.attn.qkv, QVLoRA)]
    assert found == adapted_blocks
