"""What is true of every adapter: what learns, what is refused, and that graphs can be made of it."""

import re
from typing import Any

import pytest
import timm
import torch
from torch import nn

import mor
from ei.compilation import compile_backbones
from ei.config import ADAPTERS, Config, ModelConfig, TrainConfig
from ei.models.adapters import METHODS
from ei.models.backbone import adapted
from ei.models.vit import Backbone
from ei.models.vit_timm import TimmBackbone
from ei.runtime import arithmetic, narrow_frozen

LINEAR = r"vit\.blocks\.\d\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"
NORM = r"vit\.(blocks\.\d\.norm[12]|norm)"
# All names that learn, of 'tiny', and how many there are.
LEARNING = {
    "mor": (r"vit\.blocks\.\d\.mlp\.fc[12]\.mor_(A|B|router\.weight|router\.bias)", 4 * 2 * 4),
    "lora": (r"vit\.blocks\.\d\.mlp\.fc[12]\.mor_[AB]", 4 * 2 * 2),
    "loramoe": (r"vit\.blocks\.\d\.mlp\.fc[12]\.mor_(A|B|router\.weight|router\.bias)", 4 * 2 * 4),
    "frozen": ("", 0),
    "full": (r"vit\..*", 4 * 12 + 6),
    "bitfit": (rf"({LINEAR}|{NORM}|vit\.patch_embed\.proj)\.bias", 4 * 6 + 2),
    "vpt": ("prompts", 1),
    "rlrr": (
        rf"{LINEAR}\.(row_scale|column_scale|shift)|({NORM}|vit\.patch_embed)\.(scale|shift)",
        4 * (4 * 3 + 2 * 2) + 4,
    ),
    "losa": (r"side\.mixers\.[13]\.(token|channel)_(norm|mlp\.[02])\.(weight|bias)", 2 * 2 * 6),
    "latelora": (r"vit\.blocks\.[23]\.attn\.qkv\.lora_[AB]", 2 * 2),
    "peft:ia3": (r"vit\.blocks\.\d\.mlp\.fc[12]\.ia3_l\.default", 4 * 2),
    "peft:ln_tuning": (rf"{NORM}\.ln_tuning_layers\.default\.(weight|bias)", 9 * 2),
}


def settings_of(adapter: str, **settings: Any) -> ModelConfig:
    return ModelConfig(adapter=adapter, fusion="late", **settings)


def stir(backbone: nn.Module) -> None:
    """As training does: matrices that start as zero would keep gradients from others."""
    with torch.no_grad():
        for parameter in mor.trainable_parameters(backbone).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_every_name_has_a_function() -> None:
    assert METHODS.keys() == ADAPTERS.keys()


@pytest.mark.parametrize("adapter", LEARNING)
def test_what_is_named_learns_and_the_rest_is_the_trunks(trunk: Backbone, adapter: str) -> None:
    if adapter.startswith("peft:"):
        pytest.importorskip("peft")
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    backbone = adapted(trunk, settings_of(adapter))
    stir(backbone)
    images, tokens = torch.randn(3, 3, 8, 8, requires_grad=True), torch.randn(3, 2, 64)
    backbone(images, None if adapter == "losa" else tokens).square().sum().backward()

    pattern, count = LEARNING[adapter]
    learning = mor.trainable_parameters(backbone)
    assert len(learning) == count and all(re.fullmatch(pattern, name) for name in learning)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learning.values())
    shared = {id(tensor) for tensor in trunk.parameters()}
    rest = [parameter for parameter in backbone.parameters() if not parameter.requires_grad]
    assert all(id(parameter) in shared and parameter.grad is None for parameter in rest)
    assert not shared & {id(parameter) for parameter in learning.values()}
    assert trunk.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


@pytest.mark.parametrize("adapter", LEARNING)
def test_where_it_starts(trunk: Backbone, adapter: str) -> None:
    """At the frozen backbone; but prompts are tokens whatever they are, and rlrr draws its scales."""
    if adapter.startswith("peft:"):
        pytest.importorskip("peft")
    images = torch.randn(2, 3, 8, 8)
    starts_there = torch.allclose(adapted(trunk, settings_of(adapter))(images), trunk(images), atol=1e-5)
    assert starts_there == (adapter not in ("vpt", "rlrr"))


@pytest.mark.parametrize("adapter", [*(name for name in LEARNING if name != "frozen"), "peft:randlora"])
def test_what_was_learned_fits_another_fork(trunk: Backbone, adapter: str) -> None:
    """As a checkpoint's parameters are put on the trunk again, whatever the random numbers are by then.

    RandLoRA keeps random matrices that it does not train.
    """
    if adapter.startswith("peft:"):
        pytest.importorskip("peft")
    images = torch.randn(2, 3, 8, 8)
    first = adapted(trunk, settings_of(adapter))
    stir(first)
    second = adapted(trunk, settings_of(adapter))
    with torch.no_grad():
        for name, parameter in mor.trainable_parameters(second).items():
            parameter.copy_(first.get_parameter(name))
    assert torch.equal(first(images), second(images))
    assert not torch.equal(first(images), trunk(images))


@pytest.mark.parametrize("adapter", [*LEARNING, "peft:hira", "peft:osf"])
def test_training_in_bf16_computes_what_evaluation_does(trunk: Backbone, adapter: str) -> None:
    """Training holds frozen weights in bf16; what rescales or decomposes them must do so before they are rounded."""
    if adapter.startswith("peft:"):
        peft = pytest.importorskip("peft")
        if adapter.removeprefix("peft:").upper() not in peft.PeftType.__members__:
            pytest.skip(f"peft {peft.__version__} does not have it yet")
    backbone = adapted(trunk, settings_of(adapter))
    stir(backbone)
    images = torch.randn(2, 3, 8, 8)
    with arithmetic(torch.device("cpu"), "bf16"):
        expected = backbone(images)
        narrow_frozen(backbone, "bf16")
        assert torch.equal(backbone(images), expected)


@pytest.mark.parametrize("adapter", [*LEARNING, "peft:lora", "peft:osf"])
def test_a_second_stage_after_one_in_bf16_learns_in_fp32(trunk: Backbone, adapter: str) -> None:
    """Its adapters are made on a trunk whose weights the first stage holds in bf16, and start where they would have."""
    if adapter.startswith("peft:"):
        pytest.importorskip("peft")
    torch.manual_seed(1)
    first = adapted(trunk, settings_of(adapter))
    narrow_frozen(first, "bf16")
    torch.manual_seed(1)
    second = mor.trainable_parameters(adapted(trunk, settings_of(adapter)))
    assert all(parameter.dtype == torch.float32 for parameter in second.values())
    assert all(torch.equal(parameter, first.get_parameter(name)) for name, parameter in second.items())


@pytest.mark.parametrize("adapter", LEARNING)
def test_a_setting_changes_something_or_is_refused(trunk: Backbone, adapter: str) -> None:
    experts = {"lora": 1}.get(adapter, 3)
    others: dict[str, Any] = {
        "targets": ("fc2",),
        "ranks": (3,) * experts if adapter in ("mor", "loramoe") else (3,),
        "alphas": (5.0,) * experts,
        "dropout": 0.1,
        "blocks": (1,),
        "prompts": 3,
        "scale_patches": False,
    }
    assert set(others) == {name for used in ADAPTERS.values() for name in used}
    if adapter.startswith("peft:"):
        pytest.importorskip("peft")
        heeded = () if adapter == "peft:ln_tuning" else ("targets",)
    else:
        heeded = ADAPTERS[adapter]
    usual = described(adapted(trunk, settings_of(adapter)))
    for name, value in others.items():
        if name in heeded:
            assert described(adapted(trunk, settings_of(adapter, **{name: value}))) != usual, name
        else:
            with pytest.raises(ValueError, match=f"with adapter '{adapter}', {name} would change nothing; leave it"):
                settings_of(adapter, **{name: value})


def described(backbone: Backbone) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
    shapes = [(name, tuple(parameter.shape)) for name, parameter in mor.trainable_parameters(backbone).items()]
    return repr(backbone), shapes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "peft:"}, "adapter must be one of mor, .*, or peft:NAME, got 'peft:'$"),
        ({"adapter": "vpt", "prompts": 0}, "prompts must be at least 1, got 0"),
        ({"adapter": "losa", "blocks": (-1,)}, "blocks must be different numbers from 0 on, got"),
        ({"adapter": "latelora", "blocks": (2, 2)}, "blocks must be different numbers from 0 on, got"),
        ({"adapter": "losa", "fusion": "ei"}, "fusion must be 'late' with adapter 'losa', which .* got 'ei'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"fusion": "late", **settings})


@pytest.mark.parametrize("adapter", ["losa", "latelora"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": (2, 4)}, r"ranks must be a single rank with adapter '\w+', got \(2, 4\); several are 'mor'"),
        ({"ranks": (0,)}, "ranks must be at least 1, got"),
        ({"blocks": (1, 4)}, r"blocks must be within the ViT's 0\.\.3, got 4"),
    ],
)
def test_settings_that_do_not_fit_the_backbone(trunk: Backbone, adapter: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(trunk, settings_of(adapter, **settings))


@pytest.mark.parametrize("adapter", ["mor", "lora"])
def test_blocks_that_mixtures_of_ranks_have_not_got(trunk: Backbone, adapter: str) -> None:
    with pytest.raises(ValueError, match=r"^blocks must be within the ViT's 0\.\.3, got 12$"):
        adapted(trunk, ModelConfig(adapter=adapter, blocks=(0, 12)))


def test_blocks_of_mixtures_of_ranks(trunk: Backbone) -> None:
    backbone = adapted(trunk, ModelConfig(blocks=(0, 2)))
    assert {name.split(".")[2] for name in mor.trainable_parameters(backbone)} == {"0", "2"}


# Dynamo asks every input for its gradient, and silences what torch says to that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("adapter", ["bitfit", "vpt", "rlrr", "losa", "latelora"])
def test_a_graph_computes_the_same(monkeypatch: pytest.MonkeyPatch, adapter: str) -> None:
    vit = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=0)
    plain = adapted(TimmBackbone(vit, 8), settings_of(adapter))
    stir(plain)
    compiled = plain.fork()
    compile = torch.compile
    # The same tracing without what comes after it, which takes minutes; a break in the graph is an error.
    monkeypatch.setattr(torch, "compile", lambda model, *, mode, **kw: compile(model, backend="eager", **kw))
    compile_backbones(nn.ModuleList([compiled]), "on")
    images, tokens = torch.randn(3, 3, 8, 8), torch.randn(3, 2, 8)
    seen = torch.tensor([[True, False], [True, True], [False, False]])
    gradients = []
    for backbone in (plain, compiled):
        backbone(*((images,) if adapter == "losa" else (images, tokens, seen))).square().sum().backward()
        gradients.append({name: p.grad for name, p in mor.trainable_parameters(backbone).items()})
    torch.testing.assert_close(*gradients)


def test_methods_of_peft_are_not_compiled() -> None:
    with pytest.raises(ValueError, match="compile must be 'off' with adapter 'peft:ia3', got 'graphs'"):
        Config(model=ModelConfig(adapter="peft:ia3"), train=TrainConfig(compile="graphs"))
