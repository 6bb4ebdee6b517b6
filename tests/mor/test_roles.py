import pytest
import torch
from torch import nn

from mor import inject
from mor.roles import resolve


def short(names):
    return [name.removeprefix("blocks.") for name in names]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["qkv"], ["0.attn.qkv", "1.attn.qkv", "2.attn.qkv"]),
        (["proj"], ["0.attn.proj", "1.attn.proj", "2.attn.proj"]),
        (["fc1"], ["0.mlp.fc1", "1.mlp.fc1", "2.mlp.fc1"]),
        (["fc2"], ["0.mlp.fc2", "1.mlp.fc2", "2.mlp.fc2"]),
        (["fc"], ["0.mlp.fc1", "0.mlp.fc2", "1.mlp.fc1", "1.mlp.fc2", "2.mlp.fc1", "2.mlp.fc2"]),
        (["blocks.1.*"], ["1.attn.qkv", "1.attn.proj", "1.mlp.fc1", "1.mlp.fc2"]),
        (["fc1", "*.0.attn.*"], ["0.attn.qkv", "0.attn.proj", "0.mlp.fc1", "1.mlp.fc1", "2.mlp.fc1"]),
        (["head"], ["head"]),
    ],
    ids=str,
)
def test_targets(vit, targets, found):
    assert short(resolve(vit, targets)) == found


def test_roles_stay_inside_blocks(vit):
    """A classifier, or an attention pool, with the same names is no target of a role."""
    vit.head = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(32, 5)})})
    assert not any("head" in name for name in resolve(vit, ["fc"]))
    assert resolve(vit, ["head.*"]) == ["head.mlp.fc1"]


@pytest.mark.parametrize(
    ("layers", "found"), [([0], {0}), ([-1], {2}), (range(1, 3), {1, 2}), ([0, -1], {0, 2})], ids=str
)
def test_layers_count_blocks(vit, layers, found):
    assert {int(name.split(".")[0]) for name in short(resolve(vit, ["fc1"], layers=layers))} == found


def test_layers_bound_patterns_too(vit):
    assert resolve(vit, ["*"], layers=[1]) == [f"blocks.1.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def test_exclude(vit):
    assert short(resolve(vit, ["fc"], exclude=["fc2", "blocks.0.*"])) == ["1.mlp.fc1", "2.mlp.fc1"]


def test_open_clip_towers():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        tower = open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={"layers": 2, "width": 64, "patch_size": 16, "image_size": 32},
            text_cfg={"layers": 1, "width": 64, "heads": 1, "vocab_size": 100},
        ).visual
    found = resolve(tower, ["fc"])
    assert found == [f"transformer.resblocks.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"targets": ["fc3"]}, r"target 'fc3' matches no nn.Linear; roles are qkv, .* blocks.\*.attn.qkv"),
        ({"targets": ["fc", "query"]}, "target 'query' matches no"),
        ({"targets": ["fc"], "exclude": ["typo"]}, "exclude 'typo' matches no"),
        ({"targets": ["qkv"], "exclude": ["fc1", "fc3*"]}, r"exclude 'fc3\*' matches no"),
        ({"targets": ["fc"], "layers": [3]}, r"layers must be blocks of the model, which has 3, got \[3\]"),
        ({"targets": ["fc"], "layers": []}, "layers must name at least one block"),
        ({"targets": ["head"], "layers": [0]}, "target 'head' matches no nn.Linear in the chosen layers"),
        ({"targets": ["fc"], "exclude": ["*"]}, "nothing is left"),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing(vit, call, message):
    with pytest.raises(ValueError, match=message):
        resolve(vit, **call)


def test_a_role_outside_of_blocks_says_so():
    with pytest.raises(ValueError, match=r"it is a role, .* a pattern such as '\*fc\*'"):
        resolve(nn.ModuleDict({"fc": nn.Linear(2, 2)}), ["fc"])


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="there is no nn.Linear at all"):
        resolve(nn.Sequential(nn.Conv2d(3, 4, 1)), ["fc"])


def test_hosts_that_never_call_the_layer_are_refused():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        beit = timm.create_model("beit_base_patch16_224", num_classes=0, depth=2)
    with pytest.raises(ValueError, match=r"would do nothing: blocks.0.attn.qkv, blocks.1.attn.qkv"):
        inject(beit, targets=["qkv", "fc"])
    inject(beit, targets="fc")
    with pytest.raises(ValueError, match="would do nothing: linear1, linear2"):
        inject(nn.TransformerEncoderLayer(8, 2), targets=["linear1", "linear2"])
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="would do nothing: 0.attn.out_proj"):
        inject(nn.Sequential(attention), targets="*.out_proj")
