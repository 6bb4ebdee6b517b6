"""How much each method of the paper's Table 7 trains: whole numbers, and the means that it prints.

ViT-B: D = 768, L = 12 blocks. A head has D * C + C parameters: 3,076, 3,845 and 2,307 with 4, 5 and 3 classes, those
of the paper's data sets, on images of 448, 512 and 256 px. Means are over these three. n is the number of tokens.
"""

from functools import cache
from typing import Any

import pytest
import torch

from ei.config import Config, DataConfig, ModelConfig
from ei.models import Backbone, build_model, count_trainable, load_backbone

CLIP = "vit_base_patch16_clip_224.openai"
DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"
BOTH = (CLIP, DINOV2)
STUDIES = ((448, 4), (512, 5), (256, 3))  # side in pixels, classes
HEADS = (3_076, 3_845, 2_307)


@cache
def trunk(backbone: str, side: int) -> Backbone:
    with torch.device("meta"):
        return load_backbone(ModelConfig(backbone=backbone), side)


def count(backbone: str, side: int, classes: int, modalities: int = 1, **settings: Any) -> dict[str, int]:
    names = tuple("xyz"[:modalities])
    # What LoSA's layers are made for, intervention tokens would change.
    model = ModelConfig(backbone=backbone, fusion="late" if modalities == 1 else "ei", **settings)
    config = Config(data=DataConfig(modalities=names), model=model)
    alone = names[0] if modalities == 1 else None
    with torch.device("meta"):
        return count_trainable(build_model(config, classes, modality=alone, trunk=trunk(backbone, side)))


def in_vit(backbone: str, **settings: Any) -> tuple[int, ...]:
    counts = [count(backbone, side, classes, **settings) for side, classes in STUDIES]
    assert [each["heads"] for each in counts] == list(HEADS)
    assert [each["total"] - each["heads"] for each in counts] == [each["ViT"] for each in counts]
    return tuple(each["ViT"] for each in counts)


def in_thousands(vits: tuple[int, ...]) -> int:
    """The mean with heads, as the paper prints it."""
    return round((sum(vits) + sum(HEADS)) / 3 / 1000)


@pytest.mark.parametrize("backbone", BOTH)
@pytest.mark.parametrize(
    ("settings", "expected", "printed"),
    [
        ({"adapter": "frozen"}, 0, 3),
        (
            {"adapter": "bitfit"},
            102_912,
            106,
        ),  # 11 D L in the blocks, D each in the final and the first norm or patches
        ({"adapter": "vpt"}, 46_080, 49),  # L p D, p = 5
        ({"adapter": "rlrr"}, 288_768, 292),  # L (27 D + 4 D) + 4 D: in, out and bias of six matrices; scale and shift
        ({"adapter": "latelora"}, 73_728, 77),  # 6 blocks, q and v, r (D + D), r = 4
        ({"adapter": "lora"}, 368_640, 372),  # 10 r D L, r = 4
        ({"adapter": "loramoe"}, 1_244_232, 1_247),  # 3 times that, and L 3 (5 D + 2) in the routers
        ({"adapter": "mor"}, 1_474_656, 1_478),  # 10 D L 14 + 4 L (5 D + 2)
        ({"adapter": "mor", "bypass": False}, 1_428_552, 1_432),  # one output of each router less: 3 L (5 D + 2)
    ],
)
def test_param_count_of_methods_that_do_not_depend_on_the_image(
    backbone: str, settings: dict[str, Any], expected: int, printed: int
) -> None:
    vits = in_vit(backbone, **settings)
    assert vits == (expected,) * 3
    assert in_thousands(vits) == printed


@pytest.mark.parametrize(
    ("backbone", "expected", "printed"),
    [
        (CLIP, (102_342, 115_302, 73_830), 100),  # n = 785, 1025, 257
        (DINOV2, (115_518, 134_148, 79_716), 113),  # n = 1029, 1374, 366, registers included
    ],
)
def test_param_count_of_losa(backbone: str, expected: tuple[int, ...], printed: int) -> None:
    """6 mixers of (2 r + 1) n + (2 r + 5) D + 2 r each, r = 4: 54 n + 59,952."""
    vits = in_vit(backbone, adapter="losa")
    assert vits == expected == tuple(54 * trunk(backbone, side).token_count() + 59_952 for side, _ in STUDIES)
    assert in_thousands(vits) == printed


def test_param_count_of_full_tuning_of_clip() -> None:
    """85,799,424 for 197 positions, and D for each more."""
    vits = in_vit(CLIP, adapter="full")
    assert vits == (86_251_008, 86_435_328, 85_845_504)
    assert in_thousands(vits) == 86_180


def test_param_count_of_full_tuning_of_dinov2() -> None:
    """The paper has the 1369 positions of 518 px at every size, interpolated in each step; here they are resized once.

    And timm's model lacks 1,536 parameters of the hub's, from which the paper prints 86,587.
    """
    assert in_vit(DINOV2, adapter="full") == (86_317_056, 86_582_016, 85_807_872)
    native = count(DINOV2, 518, 4, adapter="full")["ViT"]
    assert native == 86_582_016
    assert in_thousands((native,) * 3) == 86_585
    assert in_thousands((native + 1_536,) * 3) == 86_587


@pytest.mark.parametrize(
    ("settings", "expected", "printed"),
    [
        ({"adapter": "frozen"}, (1_200_402, 1_203_478, 3_575_829), 2.0),
        ({"adapter": "lora"}, (2_674_962, 2_678_038, 5_787_669), 3.7),
        ({"adapter": "lora", "targets": ("qkv",)}, (1_790_226, 1_793_302, 4_460_565), 2.7),
        ({"adapter": "loramoe"}, (6_177_330, 6_180_406, 11_041_221), 7.8),
    ],
)
def test_param_count_of_early_intervention(settings: dict[str, Any], expected: tuple[int, ...], printed: float) -> None:
    """2 M P + M (M - 1) 592,512 + 2 M (D C + C) + M^2 D + M, P of the tables above; M is 2, 2 and 3.

    The paper prints the means in millions; its LoRA's 2.7 is that on qkv, P = 147,456, or that of Table 7 with two
    modalities. MoR's are those of the shipped configurations, see test_parameters.py.
    """
    counts = [
        count(CLIP, side, classes, modalities, **settings)["total"]
        for (side, classes), modalities in zip(STUDIES, (2, 2, 3), strict=True)
    ]
    assert tuple(counts) == expected
    assert round(sum(counts) / 3 / 1e6, 1) == printed


def test_param_count_of_methods_of_peft() -> None:
    """(IA)^3 on qkv and fc2: L (3 D + 4 D); LN tuning: 2 D for each norm, one of CLIP's being before the blocks."""
    pytest.importorskip("peft")
    assert count(CLIP, 256, 3, adapter="peft:ia3", targets=("qkv", "fc2"))["ViT"] == 64_512
    assert count(CLIP, 256, 3, adapter="peft:ln_tuning")["ViT"] == 26 * 2 * 768 == 39_936
    assert count(DINOV2, 256, 3, adapter="peft:ln_tuning")["ViT"] == 25 * 2 * 768 == 38_400
