"""Numbers of trained parameters, exactly as the method has them; on the meta device, without weights."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ei.config import Config, DataConfig, ModelConfig, find_config
from ei.models import Backbone, build_model, count_trainable, load_backbone

CLIP = "vit_base_patch16_clip_224.openai"
P, P_LARGE = 1_474_656, 3_932_352


@pytest.fixture(scope="module")
def clip() -> Backbone:
    with torch.device("meta"):
        return load_backbone(ModelConfig(backbone=CLIP), 224)


def count(
    trunk: Backbone, classes: int, modality: str | None = None, modalities: Sequence[str] = ("cfp", "oct"), **model: Any
) -> dict[str, int]:
    config = Config(data=DataConfig(modalities=tuple(modalities)), model=ModelConfig(**model))
    with torch.device("meta"):
        return count_trainable(build_model(config, classes, modality=modality, trunk=trunk))


@pytest.mark.parametrize(("adapter", "total"), [("mor", 7_099_026), ("frozen", 1_200_402)])
def test_early_intervention(clip: Backbone, adapter: str, total: int) -> None:
    counts = count(clip, 4, adapter=adapter)
    vits = 2 * P if adapter == "mor" else 0
    assert counts == {
        "primary ViTs": vits,
        "auxiliary ViTs": vits,
        "INT adapters": 2 * 592_512,
        "heads": 4 * 3_076,
        "fusion": 2 * 2 * 768 + 2,
        "total": total,
    }


def test_more_modalities_and_a_wider_vit() -> None:
    m, d, c = 3, 1024, 5
    adapter = 2 * d + 384 * d + 384 + 384 * d + d  # the hidden width does not grow with the ViT
    expected = 2 * m * P_LARGE + m * (m - 1) * adapter + 2 * m * (d * c + c) + m * m * d + m
    with torch.device("meta"):
        large = load_backbone(ModelConfig(backbone="vit_large_patch14_clip_224.openai"), 224)
    assert count(large, c, modalities="xyz")["total"] == expected


@pytest.mark.parametrize("backbone", ["clip", "dinov2"])
@pytest.mark.parametrize(
    ("data", "m", "c", "total"),
    [("mmc-amd", 2, 4, 7_099_026), ("derm7pt", 2, 5, 7_102_102), ("mrnet", 3, 3, 12_423_765)],
)
def test_shipped_configurations(data: str, m: int, c: int, total: int, backbone: str) -> None:
    config = Config.load(find_config(f"{data}-{backbone}"))
    classes = len(config.data.classes or config.data.labels)
    with torch.device("meta"):
        counts = count_trainable(build_model(config, classes))
    assert (len(config.data.modalities), classes) == (m, c)
    assert counts["total"] == total == 2 * m * P + m * (m - 1) * 592_512 + 2 * m * (768 * c + c) + m * m * 768 + m


def test_shared_adapters_are_counted_once(clip: Backbone) -> None:
    m = 2
    shared = count(clip, 4, share_adapters=True)
    assert (shared["primary ViTs"], shared["auxiliary ViTs"]) == (m * P, 0)
    assert shared["total"] == 4_149_714 == count(clip, 4)["total"] - m * P
    everything = sum(item.numel() for item in clip.parameters())
    assert count(clip, 4, share_adapters=True, adapter="full")["primary ViTs"] == m * everything


def test_a_smaller_auxiliary_backbone(clip: Backbone) -> None:
    """ViT-S: each of its two adapted layers per block is a quarter of ViT-B's; INT adapters go from 384 to 768."""
    m, d, small, c = 2, 768, 384, 4
    layers = [14 * (k + o) + 4 * (k + 1) for k, o in ((small, 4 * small), (4 * small, small))]
    p_small, adapter = 12 * sum(layers), 2 * small + (small + 1) * 384 + (384 + 1) * d
    assert (p_small, adapter) == (737_376, 444_288)
    counts = count(clip, c, aux_backbone="vit_small_patch16_224.augreg_in21k")
    assert counts == {
        "primary ViTs": m * P,
        "auxiliary ViTs": m * p_small,
        "INT adapters": m * (m - 1) * adapter,
        "heads": m * c * (d + 1 + small + 1),
        "fusion": m * m * d + m,
        "total": 5_324_946,
    }


def test_late_fusion_has_no_auxiliary_parts(clip: Backbone) -> None:
    counts = count(clip, 4, fusion="late")
    assert list(counts) == ["primary ViTs", "heads", "fusion", "total"]
    assert counts["total"] == 2 * P + 2 * 3_076 + 2 * 2 * 768 + 2


@pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2.lvd142m", "open_clip:ViT-B-16:openai"])
def test_other_vit_b_have_the_same_adapters(name: str) -> None:
    with torch.device("meta"):
        backbone = load_backbone(ModelConfig(backbone=name), 224)
    assert count(backbone, 4, "oct")["ViT"] == P


def test_parts_add_up_to_what_requires_a_gradient(make_config) -> None:
    for settings in ({}, {"fusion": "late"}, {"adapter": "full"}, {"adapter": "frozen"}):
        model = build_model(make_config(**settings), 4)
        everything = sum(item.numel() for item in model.parameters() if item.requires_grad)
        assert count_trainable(model)["total"] == everything > 0


def test_a_shared_parameter_counts_once() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def parts(self) -> dict[str, list[torch.nn.Module]]:
            return {"first": [self.layer, self.layer], "again": [self.layer]}

    assert count_trainable(Twice()) == {"first": 8, "again": 0, "total": 8}
