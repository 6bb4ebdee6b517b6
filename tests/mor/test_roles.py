import numpy as np
import pytest
import torch
from torch import nn

from mor.hosts import linear_names
from mor.roles import collapse, find_blocks, resolve, role_of


def short(found):
    return [name.removeprefix("blocks.") for name in found]


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


def names(model, *targets, **options) -> list[str]:
    """What is found, with the numbers of layers left out."""
    return sorted({collapse(name) for name in resolve(model, targets, **options)})


def meta(name: str, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        # An MLP inside an attention makes position biases; the pool, the downsampling and the head are no blocks.
        ("vit_relpos_base_patch16_224", ["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]),
        ("vit_base_patch16_siglip_224", ["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]),
        ("swinv2_cr_tiny_224", ["stages.*.blocks.*.mlp.fc1", "stages.*.blocks.*.mlp.fc2"]),
        ("swinv2_tiny_window8_256", ["layers.*.blocks.*.mlp.fc1", "layers.*.blocks.*.mlp.fc2"]),
        ("levit_128s", ["stages.*.blocks.*.mlp.ln1.linear", "stages.*.blocks.*.mlp.ln2.linear"]),
        ("caformer_s18", ["stages.*.blocks.*.mlp.fc1", "stages.*.blocks.*.mlp.fc2"]),
        # Attentions and MLPs that run in parallel are one block.
        ("vit_base_patch16_18x2_224", ["blocks.*.ffns.*.mlp.fc1", "blocks.*.ffns.*.mlp.fc2"]),
    ],
)
def test_fc_is_only_the_mlp_of_a_block(name, found):
    assert names(meta(name), "fc") == found


def test_blocks_are_neither_stages_nor_steps():
    def blocks(name):
        model = meta(name)
        return {collapse(block + ".") for block in find_blocks(model, linear_names(model))}

    assert blocks("swin_tiny_patch4_window7_224") == {"layers.*.blocks.*."}
    assert blocks("vit_base_patch16_18x2_224") == {"blocks.*."}
    assert blocks("crossvit_9_240") == {"blocks.*.blocks.*.*.", "blocks.*.fusion.*."}
    assert blocks("mobilevit_s") == {"stages.*.*.transformer.*."}
    assert blocks("convnext_atto") == set()


def test_layers_count_blocks_of_all_stages():
    model = meta("swin_tiny_patch4_window7_224")
    assert resolve(model, ["qkv"], layers=[2, -1]) == ["layers.1.blocks.0.attn.qkv", "layers.3.blocks.1.attn.qkv"]


def test_roles_do_not_overlap_and_all_is_their_union(vit):
    parts = [resolve(vit, [role]) for role in ("qkv", "proj", "fc1", "fc2")]
    assert sorted(resolve(vit, ["all"])) == sorted(name for part in parts for name in part)
    assert len({name for part in parts for name in part}) == 12


def test_packed_layers_are_no_single_role():
    """The *_xp blocks hold qkv and fc1 in one matrix."""
    model = meta("vit_base_patch16_xp_224")
    for role in ("qkv", "fc", "fc1"):
        with pytest.raises(ValueError, match=rf"'{role}' is packed with .* into blocks.\*.in_proj; .*\*.in_proj'"):
            resolve(model, [role])
    assert names(model, "proj", "fc2") == ["blocks.*.attn_out_proj", "blocks.*.mlp_out_proj"]
    assert names(model, "all") == ["blocks.*.attn_out_proj", "blocks.*.in_proj", "blocks.*.mlp_out_proj"]
    assert role_of(model, ["blocks.0.in_proj", "blocks.0.attn_out_proj", "head"]) == {
        "blocks.0.in_proj": "qkv+fc1",
        "blocks.0.attn_out_proj": "proj",
        "head": "",
    }


def test_convolutions_of_these_names_are_mentioned():
    with pytest.raises(ValueError, match=r"stages.\*.blocks.\*.mlp.fc1, .* are convolutions, which are not adapted"):
        resolve(meta("coatnet_0_224"), ["fc"])


def test_open_clip_towers():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={"layers": 2, "width": 64, "patch_size": 16, "image_size": 32},
            text_cfg={"layers": 1, "width": 64, "heads": 1, "vocab_size": 100},
        )
    found = resolve(model.visual, ["fc"])
    assert found == [f"transformer.resblocks.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj")]
    assert resolve(model, ["qkv"], exclude=["transformer.*"]) == [
        f"visual.transformer.resblocks.{i}.attn.in_proj" for i in range(2)
    ]


def linear(*names: str) -> nn.Module:
    """A model with one block that has linear layers of these names, and a list of the same outside of any block."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    for name in names:
        at = model.blocks[0]
        for step in name.split(".")[:-1]:
            if not hasattr(at, step):
                at.add_module(step, nn.Module())
            at = at.get_submodule(step)
        at.add_module(name.split(".")[-1], nn.Linear(2, 2))
    return model


@pytest.mark.parametrize(
    ("qkv", "proj", "fc1", "fc2"),
    [
        # transformers 4: ViT, BEiT, DINOv2, Swin
        (
            ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
            ["attention.output.dense"],
            ["intermediate.dense"],
            ["output.dense"],
        ),
        # transformers 5, and a gated MLP
        (
            ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
            ["attention.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ),
        (["attn.qkv"], ["attn.proj"], ["mlp.w12"], ["mlp.w3"]),  # DINOv2's own code
        (["0.to_qkv"], ["0.to_out.0"], ["1.net.1"], ["1.net.4"]),  # vit-pytorch
    ],
)
def test_names_of_families_that_are_not_installed(qkv, proj, fc1, fc2):
    model = linear(*qkv, *proj, *fc1, *fc2, "attn.rel_pos.mlp.fc1", "cpb_mlp.0", "norm.fc")
    for role, expected in (("qkv", qkv), ("proj", proj), ("fc1", fc1), ("fc2", fc2)):
        assert [name.removeprefix("blocks.0.") for name in resolve(model, [role])] == expected


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
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "tower": nn.ModuleDict({"key": nn.Linear(2, 2)})})
    message = r"it is a role, .* such as '\*fc', '\*.key'; .* blocks are elements of an nn.ModuleList or nn.Sequential"
    with pytest.raises(ValueError, match=message):
        resolve(model, ["qkv"])
    assert resolve(model, ["*fc"]) == ["fc"]
    assert resolve(model, ["*.key"]) == ["tower.key"]


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="there is no nn.Linear at all"):
        resolve(nn.Sequential(nn.Conv2d(3, 4, 1)), ["fc"])


class Attention(nn.Module):
    """As many write it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.Wq, self.Wk, self.Wv, self.Wo = (nn.Linear(8, 8) for _ in range(4))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


@pytest.mark.parametrize(
    ("attention", "of_attention"),
    [
        (Attention, {"Wq": "qkv", "Wk": "qkv", "Wv": "qkv", "Wo": "proj"}),
        (lambda: nn.MultiheadAttention(8, 2), {"in_proj": "qkv", "out_proj": "proj"}),
    ],
)
@pytest.mark.parametrize("name", ["attn", "mha", "msa"])
@pytest.mark.parametrize("name_of_mlp", ["mlp", "MLP", "feedforward", "feed_forward", "ffn", "FFN"])
def test_hand_written_blocks_are_adapted_whole(attention, of_attention, name, name_of_mlp):
    model = nn.Sequential(*(nn.ModuleDict({name: attention(), name_of_mlp: mlp()}) for _ in range(2)))
    roles = {f"{name}.{layer}": role for layer, role in of_attention.items()}
    roles |= {f"{name_of_mlp}.0": "fc1", f"{name_of_mlp}.2": "fc2"}
    expected = {f"{i}.{layer}": role for i in range(2) for layer, role in roles.items()}
    assert role_of(model, resolve(model, "all")) == expected


@pytest.mark.parametrize("name", ["communication", "attn.inner"])
def test_an_attention_of_torch_is_known_by_its_type(name):
    model = nn.Sequential(nn.Module())
    at = model[0]
    for step in name.split("."):
        at.add_module(step, nn.MultiheadAttention(8, 2) if name.endswith(step) else nn.Module())
        at = at.get_submodule(step)
    model[0].mlp = mlp()
    found = resolve(model, "all")
    assert found == [f"0.{name}.in_proj", f"0.{name}.out_proj", "0.mlp.0", "0.mlp.2"]


@pytest.mark.parametrize(("outputs", "inner"), [("w2", "w3"), ("w3", "w2")])
def test_the_output_of_a_gated_mlp_is_known_by_its_shape(outputs, inner):
    """w2 is the output in Llama's, w3 in EVA's."""
    gated = nn.ModuleDict({"w1": nn.Linear(8, 16), inner: nn.Linear(8, 16), outputs: nn.Linear(16, 8)})
    model = nn.Sequential(nn.ModuleDict({"attn": Attention(), "mlp": gated}))
    assert set(resolve(model, "fc1")) == {"0.mlp.w1", f"0.mlp.{inner}"}
    assert resolve(model, "fc2") == [f"0.mlp.{outputs}"]


def test_all_warns_of_layers_that_have_no_role(vit):
    for block in vit.blocks:
        block.mixer, block.attn.rel_pos = nn.Linear(32, 32), nn.ModuleDict({"mlp": nn.Linear(2, 2)})
    with pytest.warns(UserWarning, match=r"'all' leaves out blocks.\*.mixer, which .*'blocks.\*.mixer'\]\), or"):
        assert len(resolve(vit, "all")) == 12
    assert len(resolve(vit, ["all", "blocks.*.mixer"])) == 15
    assert len(resolve(vit, "all", exclude="blocks.*.mixer")) == 12
    assert len(resolve(vit, "fc")) == 6


def test_the_same_layer_under_a_name_without_role_is_not_left_out(vit):
    vit.blocks[0].alias = vit.blocks[0].mlp
    assert "blocks.0.mlp.fc1" in resolve(vit, "all")


@pytest.mark.parametrize("layers", [1, np.int64(1), [np.int64(1)], np.arange(1, 2), range(1, 2), (-2,), {1}])
def test_numbers_of_blocks(vit, layers):
    assert resolve(vit, "fc1", layers=layers) == ["blocks.1.mlp.fc1"]


@pytest.mark.parametrize("layers", [True, [False, True], "1", ["1"], 1.0, [1.0], slice(2), {"1": 1}], ids=str)
def test_what_numbers_no_block(vit, layers):
    with pytest.raises(TypeError, match=r"layers must be numbers of blocks, such as 0, \[0, -1\] or range\(6\), got "):
        resolve(vit, "fc1", layers=layers)


def test_excluding_what_is_not_chosen_does_no_harm(vit):
    assert resolve(vit, "fc1", exclude=["blocks.0.*"], layers=[1]) == ["blocks.1.mlp.fc1"]
