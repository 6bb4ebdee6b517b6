"""Every family of Vision Transformers, small and with random weights: what roles find in it, and whether it lives.

    PYTHONPATH=.:kernels python tests/mor/zoo.py            # the table on the screen
    PYTHONPATH=.:kernels python tests/mor/zoo.py --write    # ... and in docs/zoo.md (`make zoo`)

Needs timm, open_clip, transformers and torchvision; no network, no weights.
"""

import copy
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import mor
from mor.hosts import linear_names, note
from mor.injection import mor_layers
from mor.roles import collapse, find_blocks, resolve, role_of

DOCUMENT = Path(__file__).parents[2] / "docs/zoo.md"
PARTS = ("qkv", "proj", "fc1", "fc2", "packed")
# Replaced attentions, and torch's kernels that are no longer used, add up in another order.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how to build it, and the shape of its input (or the input itself)."""

    build: Callable[[], nn.Module]
    example: tuple[int, ...] | Callable[[], Any] = (2, 3, 32, 32)


@dataclass(frozen=True)
class Row:
    """What was found in a model. ``difference`` is that of the outputs at injection, relative to the largest."""

    blocks: int
    counts: dict[str, int]
    names: tuple[str, ...]
    hosts: tuple[str, ...]
    difference: float = float("nan")


def timm_model(name: str, **options: Any) -> nn.Module:
    return importlib.import_module("timm").create_model(name, **{"num_classes": 3, **options})


def timm_entry(name: str, size: int = 32, **options: Any) -> Entry:
    return Entry(lambda: timm_model(name, **options), (2, 3, size, size))


def plain(name: str, **options: Any) -> Entry:
    """Those with one stage, of 2 blocks of width 32."""
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm_entry(name, **{**sizes, **options})


def transformers_entry(kind: str, model: str = "Model", size: int = 32, channels: int = 3, **options: Any) -> Entry:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": size,
        "patch_size": 16,
    }

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        settings = {key: value for key, value in {**sizes, **options}.items() if value is not None}
        return getattr(transformers, kind + model)(getattr(transformers, kind + "Config")(**settings))

    return Entry(build, (2, channels, size, size))


def open_clip_tower(**options: Any) -> Entry:
    def build() -> nn.Module:
        transformer = importlib.import_module("open_clip").transformer
        return transformer.VisionTransformer(32, 16, 32, 2, 2, **{"mlp_ratio": 2.0, "output_dim": 8, **options})

    return Entry(build)


def open_clip_model(**vision: Any) -> Entry:
    def build() -> nn.Module:
        model = importlib.import_module("open_clip").model
        text = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 50, "context_length": 6}
        return model.CLIP(8, {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32, **vision}, text)

    def example() -> dict[str, Tensor]:
        size = vision.get("image_size", 32)
        return {"image": torch.randn(2, 3, size, size), "text": torch.randint(1, 50, (2, 6))}

    return Entry(build, example)


def torchvision_swin(version: int) -> Entry:
    def build() -> nn.Module:
        swin = importlib.import_module("torchvision").models.swin_transformer
        v2 = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
        return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [3, 3], num_classes=3, **v2)

    # 7 tokens a side: not a multiple of the window of 3.
    return Entry(build, (2, 3, 28, 28))


def torchvision_video_swin() -> nn.Module:
    swin = importlib.import_module("torchvision").models.video.swin_transformer
    return swin.SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 2], [2, 3, 3], num_classes=3)


def torchvision_vit() -> nn.Module:
    return importlib.import_module("torchvision").models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=3)


def torchvision_maxvit() -> nn.Module:
    return importlib.import_module("torchvision").models.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.1, num_classes=3)


def torch_encoder(**options: Any) -> Entry:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return Entry(build, (2, 5, 8))


def torch_transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)


# Stages have sizes of their own.
UNSIZED: dict[str, Any] = dict.fromkeys(
    ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
)
SWIN = {**UNSIZED, "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
SWIN["window_size"] = 4

ZOO: dict[str, Entry] = {
    "timm vit_base_patch16_224": plain("vit_base_patch16_224"),
    "timm deit3_small_patch16_224": plain("deit3_small_patch16_224"),
    "timm deit_tiny_distilled_patch16_224": plain("deit_tiny_distilled_patch16_224"),
    "timm vit_base_patch16_clip_224": plain("vit_base_patch16_clip_224"),
    "timm vit_base_patch16_siglip_224": plain("vit_base_patch16_siglip_224"),
    "timm vit_small_patch14_dinov2": plain("vit_small_patch14_dinov2"),
    "timm vit_small_patch14_reg4_dinov2": plain("vit_small_patch14_reg4_dinov2"),
    "timm vit_giant_patch14_dinov2": plain("vit_giant_patch14_dinov2"),
    "timm aimv2_large_patch14_224": plain("aimv2_large_patch14_224"),
    "timm vit_base_patch16_18x2_224": plain("vit_base_patch16_18x2_224"),
    "timm vit_base_patch16_xp_224": plain("vit_base_patch16_xp_224"),
    "timm vit_dpwee_patch16_reg1_gap_256": plain("vit_dpwee_patch16_reg1_gap_256"),
    "timm vit_dwee_patch16_reg1_gap_256": plain("vit_dwee_patch16_reg1_gap_256"),
    "timm vit_relpos_base_patch16_224": plain("vit_relpos_base_patch16_224"),
    "timm vit_srelpos_small_patch16_224": plain("vit_srelpos_small_patch16_224"),
    "timm vit_so150m2_patch16_reg1_gap_256": plain("vit_so150m2_patch16_reg1_gap_256"),
    "timm vit_tiny_r_s16_p8_224": timm_entry(
        "vit_tiny_r_s16_p8_224", 64, img_size=64, embed_dim=32, depth=2, num_heads=2
    ),
    "timm samvit_base_patch16": plain("samvit_base_patch16", global_attn_indexes=(1,)),
    "timm naflexvit_base_patch16_gap": timm_entry(
        "naflexvit_base_patch16_gap", embed_dim=32, depth=2, num_heads=2, pos_embed_grid_size=(2, 2)
    ),
    "timm beit_base_patch16_224": plain("beit_base_patch16_224"),
    "timm beitv2_base_patch16_224": plain("beitv2_base_patch16_224"),
    "timm eva_giant_patch14_224": plain("eva_giant_patch14_224"),
    "timm eva02_tiny_patch14_224": plain("eva02_tiny_patch14_224"),
    "timm eva02_base_patch14_224": plain("eva02_base_patch14_224"),
    "timm vit_small_patch16_dinov3": plain("vit_small_patch16_dinov3"),
    "timm vit_small_patch16_dinov3_qkvb": plain("vit_small_patch16_dinov3_qkvb"),
    "timm vit_7b_patch16_dinov3": plain("vit_7b_patch16_dinov3"),
    "timm vit_pe_core_tiny_patch16_384": plain("vit_pe_core_tiny_patch16_384"),
    "timm vit_medium_patch16_rope_reg1_gap_256": plain("vit_medium_patch16_rope_reg1_gap_256"),
    "timm swin_tiny_patch4_window7_224": timm_entry(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)
    ),
    "timm swinv2_tiny_window8_256": timm_entry(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)
    ),
    "timm swinv2_cr_tiny_224": timm_entry(
        "swinv2_cr_tiny_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)
    ),
    "timm cait_xxs24_224": plain("cait_xxs24_224", depth_token_only=1),
    "timm xcit_nano_12_p16_224": plain("xcit_nano_12_p16_224", cls_attn_layers=1),
    "timm convit_tiny": plain("convit_tiny", local_up_to_layer=1),
    "timm crossvit_tiny_240": timm_entry(
        "crossvit_tiny_240", 240, depth=[[1, 1, 0]], embed_dim=[16, 32], num_heads=[2, 2]
    ),
    "timm volo_d1_224": timm_entry("volo_d1_224", 64, img_size=64),
    "timm hiera_tiny_224": timm_entry("hiera_tiny_224", 64, img_size=(64, 64), embed_dim=16, num_heads=1),
    "timm sam2_hiera_tiny": timm_entry("sam2_hiera_tiny", 64, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
    "timm mvitv2_tiny": timm_entry("mvitv2_tiny", 64, img_size=64),
    "timm vitamin_small_224": timm_entry("vitamin_small_224", 64, img_size=64, depth=2),
    "timm pvt_v2_b0": timm_entry("pvt_v2_b0", 64),
    "timm twins_pcpvt_small": timm_entry("twins_pcpvt_small", 64, img_size=64, depths=(1, 1, 1, 1)),
    "timm twins_svt_small": timm_entry("twins_svt_small", 64, img_size=64, depths=(2, 2, 2, 2)),
    "timm levit_128s": timm_entry("levit_128s", 64, img_size=64),
    "timm tnt_s_patch16_224": timm_entry("tnt_s_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads_outer=2),
    "timm pit_ti_224": timm_entry("pit_ti_224", 64, img_size=64),
    "timm davit_tiny": timm_entry("davit_tiny", 64, depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 1)),
    "timm davit_base_fl": timm_entry("davit_base_fl", 64, depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 1)),
    "timm gcvit_xxtiny": timm_entry("gcvit_xxtiny", 64, img_size=64),
    "timm nest_tiny": timm_entry("nest_tiny", 64, img_size=64),
    "timm coat_tiny": timm_entry("coat_tiny", 64, img_size=64),
    "timm coat_lite_tiny": timm_entry("coat_lite_tiny", 64, img_size=64),
    "timm tiny_vit_5m_224": timm_entry("tiny_vit_5m_224", 64),
    "timm edgenext_xx_small": timm_entry("edgenext_xx_small", 64),
    "timm maxvit_rmlp_pico_rw_256": timm_entry("maxvit_rmlp_pico_rw_256", 64, img_size=64),
    "timm mobilevit_xxs": timm_entry("mobilevit_xxs", 64),
    "timm caformer_s18": timm_entry("caformer_s18", 64),
    "timm nextvit_small": timm_entry("nextvit_small", 64),
    "timm efficientformer_l1": timm_entry("efficientformer_l1", 224),
    "timm swiftformer_xs": timm_entry("swiftformer_xs", 64),
    "timm csatv2": timm_entry("csatv2", 64),
    "timm gemma4_vit_167m": plain("gemma4_vit_167m"),
    "timm deepseek_vit_412m": plain("deepseek_vit_412m"),
    "open_clip": open_clip_tower(),
    "open_clip custom": open_clip_tower(block_type="custom"),
    "open_clip custom, normalised": open_clip_tower(
        qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
    ),
    "open_clip CLIP": open_clip_model(),
    "open_clip CLIP with an attention pool": open_clip_model(attentional_pool=True, attn_pooler_heads=2),
    "open_clip CLIP with a timm tower": open_clip_model(
        timm_model_name="vit_tiny_patch16_224", timm_pool="token", image_size=224
    ),
    "open_clip CLIP with a ResNet": open_clip_model(layers=[1, 1, 1, 1], width=16, patch_size=None),
    "transformers ViT": transformers_entry("ViT"),
    "transformers DeiT": transformers_entry("DeiT"),
    "transformers BEiT": transformers_entry("Beit"),
    "transformers Data2Vec": transformers_entry("Data2VecVision"),
    "transformers DINOv2": transformers_entry("Dinov2"),
    "transformers DINOv2, gated": transformers_entry("Dinov2", use_swiglu_ffn=True),
    "transformers DINOv2 with registers": transformers_entry("Dinov2WithRegisters"),
    "transformers DINOv3": transformers_entry("DINOv3ViT"),
    "transformers DINOv3, gated": transformers_entry("DINOv3ViT", use_gated_mlp=True),
    "transformers CLIP": transformers_entry("CLIPVision"),
    "transformers SigLIP": transformers_entry("SiglipVision"),
    "transformers AIMv2": transformers_entry("Aimv2Vision"),
    "transformers BLIP": transformers_entry("BlipVision"),
    "transformers InternVL": transformers_entry("InternVLVision", image_size=(32, 32), patch_size=(16, 16)),
    "transformers I-JEPA": transformers_entry("IJepa"),
    "transformers ViT-MSN": transformers_entry("ViTMSN"),
    "transformers SAM": transformers_entry("SamVision", global_attn_indexes=(1,), output_channels=8),
    "transformers Swin": transformers_entry("Swin", **SWIN),
    "transformers Swinv2": transformers_entry("Swinv2", **SWIN),
    "transformers SegFormer": transformers_entry("Segformer", size=64, **UNSIZED),
    "torchvision ViT": Entry(torchvision_vit),
    "torchvision Swin": torchvision_swin(1),
    "torchvision SwinV2": torchvision_swin(2),
    "torchvision video Swin": Entry(torchvision_video_swin, (2, 3, 6, 28, 28)),
    "torchvision MaxViT": Entry(torchvision_maxvit),
    "torch TransformerEncoder": torch_encoder(batch_first=True),
    "torch TransformerEncoder, norm first": torch_encoder(batch_first=True, norm_first=True, activation="gelu"),
    "torch TransformerEncoder, tokens first": torch_encoder(),
    "torch Transformer": Entry(torch_transformer, lambda: {"src": torch.randn(2, 5, 8), "tgt": torch.randn(2, 4, 8)}),
}


def build(name: str) -> tuple[nn.Module, Any]:
    """A model with random weights, none so small (layer scales, heads) that it hides others, and its input."""
    torch.manual_seed(0)
    entry = ZOO[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = entry.build()
    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() < 0.01:
            nn.init.normal_(parameter, std=0.2)
    example = entry.example() if callable(entry.example) else torch.randn(entry.example)
    return model, example


def describe(model: nn.Module) -> Row:
    """What roles find; nothing is run, and nothing changed."""
    names = resolve(model, "all")
    counts = dict.fromkeys(PARTS, 0)
    for role in role_of(model, names).values():
        counts["packed" if "+" in role else role] += 1
    hosts = dict.fromkeys(note(model, name) for name in names)
    return Row(
        blocks=len(find_blocks(model, linear_names(model))),
        counts=counts,
        names=tuple(dict.fromkeys(collapse(name) for name in names)),
        hosts=tuple(hosts),
    )


def examine(name: str) -> Row:
    """Inject, check, save, load and eject; an AssertionError or ValueError says what is wrong."""
    model, example = build(name)
    row = describe(model)
    run(model, example)  # some keep what depends on the input's size
    before, base, outputs = state_of(model), copy.deepcopy(model), run(model, example)
    # Torch takes other kernels where weights are frozen, in layers that have nothing to do with adapters.
    frozen = run(copy.deepcopy(model).requires_grad_(False), example)

    mor.inject(model, "all")
    assert len(mor_layers(model)) == sum(row.counts.values()), "an adapter for every layer"
    difference = max(relative_difference(one, other) for one, other in zip(run(model, example), frozen, strict=True))
    is_exact = row.hosts == ("plain",)
    assert difference <= (0 if is_exact else TOLERANCE), f"the outputs differ by {difference}"
    mor.check(model, example)

    for parameter in mor.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    trained = run(model, example)
    assert max(relative_difference(one, other) for one, other in zip(trained, outputs, strict=True)) > 10 * TOLERANCE
    with tempfile.TemporaryDirectory() as folder:
        mor.save(model, folder)
        assert identical(run(mor.load(base, folder), example), trained), "save and load"

    mor.eject(model)
    assert state_of(model) == before, "eject restores every module, parameter and attribute"
    assert identical(run(model, example), outputs), "eject restores the outputs"
    return Row(row.blocks, row.counts, row.names, row.hosts, difference)


@torch.no_grad()
def run(model: nn.Module, example: Any) -> list[Tensor]:
    """Outputs in training, with the same random draws each time, then in evaluation."""
    outputs = []
    for training in (True, False):
        # Running means must not move, or the second run would differ from the first.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.manual_seed(1)
        model.train(training)
        outputs += list(tensors(model(**example) if isinstance(example, dict) else model(example)))
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    return outputs


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from tensors(item)


def relative_difference(one: Tensor, other: Tensor) -> float:
    largest = other.abs().max().clamp(min=1e-6)
    return float((one - other).abs().max() / largest)


def identical(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Modules and parameters by identity, and every attribute that is a plain value."""
    values = (bool, int, float, str, type(None))
    modules = {
        name: (id(module), type(module), {k: v for k, v in vars(module).items() if isinstance(v, values)})
        for name, module in model.named_modules()
    }
    for _, _, attributes in modules.values():
        attributes.pop("training")
    return modules | {name: (id(p), p.requires_grad, p.sum().item()) for name, p in model.named_parameters()}


def table_row(name: str, row: Row) -> str:
    counts = [str(row.counts[part]) if row.counts[part] else "" for part in PARTS]
    names = " ".join(f"`{part}`" for part in common_prefix_removed(row.names))
    hosts = "; ".join(sorted(host for host in row.hosts if host != "plain")) or "plain"
    return f"| {name} | {row.blocks} | {' | '.join(counts)} | {names} | {hosts} |"


def common_prefix_removed(names: tuple[str, ...]) -> list[str]:
    """Names from the attention or the MLP on: the block in front of them is the family's own."""
    return list(dict.fromkeys(name.rsplit("*.", 1)[-1] for name in names))


HEADER = """\
# The zoo

What the roles find in each family of Vision Transformers, in small configurations with random weights: blocks, and
layers per role ("packed": one matrix for several roles, in "all" only). The last column says what `mor.inject` does to
modules that would otherwise read a layer's weight and never call the layer; "plain" are those without a known obstacle.

For each model the test suite makes sure that every adapter is alive in training and in evaluation; that the outputs at
injection are those of the frozen base (bit for bit where the host is "plain", else within 1e-5); that what is saved is
loaded exactly; and that `mor.eject` gives back the same model, bit for bit.

Parameters that are all zero, or nearly so, are filled with random values before: a fresh layer scale, or a fresh norm
of SwinV2, hides the adapters in front of it, and `mor.check` names it; train or set such parameters first.

nn.TransformerEncoder with a padding mask, in evaluation, gives zeros at the padded positions; adapted, it gives what
its layers compute there, as it always does in training. The positions that are not padded are the same.

Made by `make zoo`.

| model | blocks | qkv | proj | fc1 | fc2 | packed | names in a block | host |
|---|---|---|---|---|---|---|---|---|
"""


def document(rows: dict[str, Row]) -> str:
    return HEADER + "".join(f"{table_row(name, row)}\n" for name, row in rows.items())


def main() -> None:
    rows, failures = {}, []
    for name in ZOO:
        try:
            rows[name] = examine(name)
        except Exception as error:
            failures.append(name)
            print(f"{name}: {type(error).__name__}: {str(error)[:1000]}")
        else:
            print(f"{table_row(name, rows[name])} {rows[name].difference:.0e}", flush=True)
    print(f"{len(rows)} of {len(ZOO)} models: adapters alive, outputs kept, saved, loaded, taken out")
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")
    if "--write" in sys.argv:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
