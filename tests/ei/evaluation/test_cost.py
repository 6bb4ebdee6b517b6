"""Floating-point operations against the formula of a ViT, and that counting changes nothing."""

import json
from pathlib import Path

import pytest
import torch

from ei.config import Config, DataConfig, ModelConfig
from ei.evaluation.cost import forward_flops, measure_cost
from ei.models import build_model, load_backbone
from mor import MoRLinear


def config(modalities: tuple[str, ...] = ("a", "b"), **model: object) -> Config:
    return Config(
        data=DataConfig(modalities=modalities, image_size=8),
        model=ModelConfig(**{"backbone": "tiny", "adapter": "frozen", **model}),  # type: ignore[arg-type]
    )


def vit_flops(tokens: int, width: int, depth: int, patches: int, patch: int) -> int:
    """Twice the multiplications: patches, then per block qkv, attention, projection and an MLP four times as wide."""
    block = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    return 2 * (patches * 3 * patch**2 * width + depth * (block + 2 * tokens * width * 4 * width))


def test_operations_of_a_plain_vit_and_its_head() -> None:
    settings = config()
    model = build_model(settings, 4, modality="a").eval()
    one = Config(data=DataConfig(modalities=("a",), image_size=8), model=settings.model)
    assert forward_flops(model, one) == vit_flops(tokens=17, width=64, depth=4, patches=16, patch=2) + 2 * 64 * 4


def test_operations_of_early_intervention() -> None:
    auxiliary = vit_flops(tokens=17, width=64, depth=4, patches=16, patch=2)
    primary = vit_flops(tokens=18, width=64, depth=4, patches=16, patch=2)  # and an intervention token
    adapters, heads, gate = 2 * 2 * (64 * 384 + 384 * 64), 4 * 2 * 64 * 4, 2 * 128 * 2
    model = build_model(config(), 4).eval()
    assert forward_flops(model, config()) == 2 * (auxiliary + primary) + adapters + heads + gate


def test_adapters_are_counted() -> None:
    """Per token and layer: all inner rows with the router, then all outer rows."""
    plain, adapted = (forward_flops(build_model(c, 4).eval(), c) for c in (config(), config(adapter="mor")))
    ranks, outputs = 2 + 4 + 8, 4
    per_token = 2 * 4 * ((64 + 256) * (ranks + outputs) + (256 + 64) * ranks)
    assert adapted - plain == 2 * (17 + 18) * per_token


def test_attention_of_open_clip_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its towers run torch's fused attention in evaluation, for which the counter has no formula."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 8, "patch_size": 2, "width": 64, "head_width": 16, "layers": 4}
    text = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(path)
    same = config(backbone="open_clip:cost", pretrained=False)
    assert forward_flops(build_model(same, 4).eval(), same) == forward_flops(build_model(config(), 4).eval(), config())


def test_counting_leaves_the_model_as_it_was() -> None:
    settings = config(adapter="mor")
    model = build_model(settings, 4).eval()
    layers = [module for module in model.modules() if isinstance(module, MoRLinear)]
    layers[0].backend = "eager"
    before = [layer.backend for layer in layers]
    fused = torch.backends.mha.get_fastpath_enabled()
    forward_flops(model, settings)
    assert [layer.backend for layer in layers] == before and torch.backends.mha.get_fastpath_enabled() == fused
    broken = Config(data=DataConfig(modalities=("a", "b"), image_size=9), model=settings.model)
    with pytest.raises(ValueError):
        forward_flops(model, broken)
    assert [layer.backend for layer in layers] == before


def test_frozen_weights_that_branches_share_count_once() -> None:
    settings = config(adapter="mor")
    cost = measure_cost(build_model(settings, 4).eval(), settings)
    trunk = load_backbone(settings.model, 8)
    assert cost["frozen"] == sum(parameter.numel() for parameter in trunk.parameters())
    assert cost["trained"]["total"] == sum(count for part, count in cost["trained"].items() if part != "total")
    json.dumps(cost)
