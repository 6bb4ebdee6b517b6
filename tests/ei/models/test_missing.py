"""Samples that lack modalities: as if what is absent had never been there, for outputs and for gradients."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mor
from ei.data.sample import Batch
from ei.models import Backbone, LateFusion, Output, UniModal, build_model
from ei.models.fusion import ModalityFusion, module_key
from ei.models.vit_timm import TimmBackbone

THREE = ("cfp", "faf", "oct")
SIDE = 8


def tiny(**options: object) -> Backbone:
    vit = timm.models.VisionTransformer(
        img_size=SIDE, patch_size=2, embed_dim=32, depth=3, num_heads=2, num_classes=0, **options
    )
    return TimmBackbone(vit, SIDE)


def timm_registers() -> Backbone:
    return tiny(reg_tokens=4, no_embed_class=True, init_values=0.5)


def timm_not_fused() -> Backbone:
    backbone = tiny()
    for block in backbone.vit.blocks:
        block.attn.fused_attn = False
    return backbone


def timm_parallel() -> Backbone:
    return tiny(block_fn=timm.models.vision_transformer.ParallelScalingBlock)


def open_clip_default(**options: object) -> Backbone:
    open_clip = pytest.importorskip("open_clip")
    from ei.models.vit_open_clip import OpenClipBackbone

    return OpenClipBackbone(open_clip.transformer.VisionTransformer(SIDE, 2, 32, 3, 2, 2.0, **options), SIDE)


def open_clip_custom() -> Backbone:
    open_clip = pytest.importorskip("open_clip")
    if "block_type" not in inspect.signature(open_clip.transformer.VisionTransformer).parameters:
        pytest.skip("this open_clip has no vision towers of custom blocks")
    return open_clip_default(ls_init_value=0.5, block_type="custom", qk_norm=True)


BACKBONES = [tiny, timm_registers, timm_not_fused, timm_parallel, open_clip_default, open_clip_custom]


@pytest.fixture(params=BACKBONES, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[], Backbone]:
    return request.param


@pytest.fixture(params=[False, True], ids=["frozen", "mor"])
def backbone(make: Callable[[], Backbone], request: pytest.FixtureRequest, wake) -> Backbone:
    made = make()
    if request.param:
        mor.inject(made.vit, "all")
        wake(made)
    return made


# The backbone: tokens that are not seen


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("mode", ["training", "evaluation"])  # for some, another kernel
@pytest.mark.parametrize("tokens_at", [0, 2])
def test_a_token_that_is_not_seen_is_not_there(
    backbone: Backbone, mode: str, dtype: torch.dtype, close: float, tokens_at: int
) -> None:
    backbone.to(dtype).train(mode == "training")
    images, tokens = torch.randn(4, 3, SIDE, SIDE, dtype=dtype), torch.randn(4, 2, 32, dtype=dtype)
    mask = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    with torch.set_grad_enabled(mode == "training"):
        found = backbone(images, tokens, mask, tokens_at=tokens_at)
        expected = [
            backbone(images[[row]], tokens[[row]][:, mask[row]] if mask[row].any() else None, tokens_at=tokens_at)
            for row in range(4)
        ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=close, atol=close)
    with torch.set_grad_enabled(mode == "training"):
        seen = backbone(images, tokens, tokens_at=tokens_at)
    assert (seen[:3] - found[:3]).abs().amax(1).min() > 1e-4  # that it can make a difference at all


def test_what_an_unseen_token_holds_reaches_nothing(backbone: Backbone) -> None:
    images, tokens = torch.randn(2, 3, SIDE, SIDE), torch.randn(2, 2, 32, requires_grad=True)
    mask = torch.tensor([[False, True], [True, False]])
    summary = backbone(images, tokens, mask)
    other = torch.where(mask[..., None], tokens, 1e4 * torch.randn_like(tokens))
    assert torch.equal(backbone(images, other, mask), summary)
    (gradient,) = torch.autograd.grad(summary.square().sum(), tokens)
    assert torch.equal(gradient.abs().amax(-1) > 0, mask)


def test_masks_that_do_not_fit(trunk: Backbone) -> None:
    images, tokens = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 64)
    for mask in (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"token_mask must be \(2, 1\) torch.bool, got \(2, "):
            trunk(images, tokens, mask)


# Whole models


@pytest.fixture(params=["ei", "late"])
def model(make_config, wake, request: pytest.FixtureRequest) -> LateFusion:
    positions = {"int_at": 1, "int_from": 3} if request.param == "ei" else {}
    built = build_model(make_config(THREE, fusion=request.param, **positions), 4)
    wake(built)
    with torch.no_grad():
        built.fusion.gate.weight.normal_(std=0.2)
    return built


PATTERNS = {
    "all": ["cfo", "cfo", "cfo", "cfo"],
    "mixed": ["cfo", "c", "fo", "cf"],
    "one each": ["c", "f", "o", "c"],
    "no oct": ["cf", "c", "f", "cf"],
    "oct alone": ["o", "o", "o", "o"],
}


@pytest.fixture(params=PATTERNS.values(), ids=list(PATTERNS))
def batch(make_batch, request: pytest.FixtureRequest) -> Batch:
    """Four samples with one to three images of each modality that they have."""
    counts = {"cfp": (1, 2, 1, 1), "faf": (1, 1, 3, 2), "oct": (2, 1, 1, 1)}
    return make_batch(
        **{
            name: [count if name[0] in has else 0 for count, has in zip(each, request.param, strict=True)]
            for name, each in counts.items()
        }
    )


def alone(batch: Batch, row: int) -> Batch:
    return Batch(
        images={name: images[[row]] for name, images in batch.images.items()},
        present={name: present[[row]] for name, present in batch.present.items()},
        ids=[batch.ids[row]],
    )


def parts(output: Output) -> dict[str, Tensor]:
    each = {f"modality {name}": logits for name, logits in output.modality_logits.items()}
    each |= {f"auxiliary {name}": logits for name, logits in output.aux_logits.items()}
    return {"logits": output.logits, "weights": output.modality_weights} | each


def of(model: LateFusion, role: str, modality: str) -> UniModal:
    return getattr(model, role)[module_key(modality)]


@pytest.mark.parametrize("train", [True, False])
def test_a_batch_equals_its_samples_one_by_one(model: LateFusion, batch: Batch, train: bool) -> None:
    with torch.set_grad_enabled(train):
        together = parts(model(batch))
        singly = [parts(model(alone(batch, row))) for row in range(4)]
    for name, values in together.items():
        torch.testing.assert_close(values, torch.cat([one[name] for one in singly]), rtol=1e-4, atol=1e-5, msg=name)


def test_the_order_of_the_samples_does_not_matter(model: LateFusion, batch: Batch) -> None:
    order = torch.tensor([2, 0, 3, 1])
    moved = Batch(
        images={name: images[order] for name, images in batch.images.items()},
        present={name: present[order] for name, present in batch.present.items()},
    )
    one, other = parts(model(batch)), parts(model(moved))
    for name, values in one.items():
        torch.testing.assert_close(other[name], values[order], rtol=1e-4, atol=1e-5, msg=name)


def test_a_sample_with_one_modality_is_that_modality_alone(model: LateFusion, make_batch) -> None:
    batch = make_batch(cfp=(1, 1), faf=(0, 1), oct=(0, 2))
    output = model(batch)
    branch = of(model, "primary", "cfp")
    expected = branch.head(branch.backbone(batch.images["cfp"][0]))[0]
    torch.testing.assert_close(output.modality_logits["cfp"][0], expected, rtol=1e-5, atol=1e-6)
    assert output.modality_weights[0].tolist() == [1, 0, 0]
    assert torch.equal(output.logits[0], output.modality_logits["cfp"][0])


def test_weights_are_renormalised_over_what_is_there(model: LateFusion, batch: Batch) -> None:
    output, has = model(batch), batch.has_each(THREE)
    assert torch.equal(output.modality_weights > 0, has)
    torch.testing.assert_close(output.modality_weights.sum(1), torch.ones(4))
    each = torch.stack(list(output.modality_logits.values()), dim=1)
    torch.testing.assert_close(output.logits, (output.modality_weights[..., None] * each).sum(1))


def test_the_fusion_is_a_softmax_over_the_present_and_bit_for_bit_the_old_one_if_all_are() -> None:
    fusion, summaries, logits = ModalityFusion([4, 6]), [torch.randn(3, 4), torch.randn(3, 6)], [torch.randn(3, 5)] * 2
    everything = fusion(summaries, logits, torch.ones(3, 2, dtype=torch.bool))
    assert all(torch.equal(*pair) for pair in zip(everything, fusion(summaries, logits), strict=True))
    _, weights = fusion(summaries, logits, torch.tensor([[True, True], [True, False], [False, True]]))
    assert torch.equal(weights[0], everything[1][0])
    assert weights[1:].tolist() == [[1, 0], [0, 1]]


def test_without_anything_missing_no_mask_is_made(model: LateFusion, make_batch, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(TimmBackbone, "_masked", refuse)
    model(make_batch(cfp=(1, 2), faf=(1, 1), oct=(3, 1)))
    if "auxiliary" in dict(model.named_children()):
        with pytest.raises(AssertionError, match="a mask was made"):
            model(make_batch(cfp=(1, 2), faf=(1, 1), oct=(3, 0)))


@pytest.mark.fault("NaN in the pixels of a modality that is absent", "never looked at")
def test_what_is_not_there_is_never_looked_at(model: LateFusion, batch: Batch) -> None:
    poisoned = {name: images.clone() for name, images in batch.images.items()}
    for name, images in poisoned.items():
        images[~batch.present[name]] = float("nan")
    one, other = parts(model(batch)), parts(model(replace(batch, images=poisoned)))
    assert all(torch.equal(one[name], other[name]) for name in one)
    learned = mor.trainable_parameters(model).values()
    gradients = [torch.autograd.grad(sum(each.sum() for each in values.values()), learned) for values in (one, other)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def loss_of(output: Output, batch: Batch) -> Tensor:
    """The terms of training, where absent modalities have no part."""
    labels = torch.arange(len(batch.ids)) % 4
    terms = [F.cross_entropy(output.logits, labels)]
    for each in (output.modality_logits, output.aux_logits):
        for name, logits in each.items():
            has = batch.has(name)
            terms.append((F.cross_entropy(logits, labels, reduction="none") * has).sum() / has.sum().clamp_min(1))
    return torch.stack(terms).sum()


def test_every_trained_parameter_has_a_finite_gradient(model: LateFusion, batch: Batch) -> None:
    loss_of(model(batch), batch).backward()
    has = batch.has_each(THREE)
    for name, parameter in mor.trainable_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for index, modality in enumerate(THREE):
        learned = mor.trainable_parameters(of(model, "primary", modality)).values()
        assert all((parameter.grad.abs().max() > 0) == has[:, index].any() for parameter in learned), modality


def test_an_absent_target_teaches_nothing_through_its_own_logits(model: LateFusion, make_batch, gradient_of) -> None:
    batch = make_batch(cfp=(1, 1, 2), faf=(1, 1, 1), oct=(1, 0, 2))
    logits = model(batch).modality_logits["oct"]
    for row, there in enumerate(batch.has("oct").tolist()):
        loss = logits[row].square().sum()
        assert (gradient_of(loss, of(model, "primary", "oct").backbone) > 0) == there
        if "auxiliary" in dict(model.named_children()):
            assert (gradient_of(loss, of(model, "auxiliary", "cfp").backbone) > 0) == there


def test_an_absent_reference_teaches_nobody_and_is_taught_nothing(make_config, make_batch, gradient_of, wake) -> None:
    model = build_model(make_config(THREE), 4)
    wake(model)
    logits = model(make_batch(cfp=(1, 1), faf=(1, 1), oct=(1, 0))).modality_logits["cfp"]
    adapter = model.int_adapters[module_key("cfp")][module_key("oct")]
    for row, there in enumerate((True, False)):
        loss = logits[row].square().sum()
        assert (gradient_of(loss, adapter) > 0) == there
        assert (gradient_of(loss, of(model, "auxiliary", "oct").backbone) > 0) == there
        assert gradient_of(loss, of(model, "auxiliary", "faf").backbone) > 0


def test_a_batch_without_a_modality_costs_one_blank_image_where_gradients_are_wanted(model, make_batch) -> None:
    batch, sizes = make_batch(cfp=(1, 1), faf=(1, 2), oct=(0, 0)), []
    branch = of(model, "primary", "oct")
    branch.backbone.vit.patch_embed.register_forward_hook(
        lambda _, inputs, __: sizes.append((len(inputs[0]), float(inputs[0].abs().max())))
    )
    (summary,) = branch.summaries(batch, torch.randn(2, 1, 64))
    assert sizes == [(1, 0.0)] and summary.requires_grad and not summary.any()
    with torch.no_grad():
        (summary,) = branch.summaries(batch)
    assert len(sizes) == 1 and torch.equal(summary, torch.zeros(2, 64))


@pytest.mark.fault("a sample without any image reaches a model", "refused, the samples named")
def test_a_sample_needs_something(model: LateFusion, make_batch) -> None:
    with pytest.raises(ValueError, match="image of modality 'cfp' or 'faf' or 'oct', these have none: patient-1$"):
        model(make_batch(cfp=(1, 0), faf=(0, 0), oct=(1, 0)))


def test_bf16_autocast(model: LateFusion, batch: Batch) -> None:
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    torch.testing.assert_close(rounded.logits.float(), exact.logits, rtol=0.1, atol=0.1)
    assert torch.equal(rounded.modality_weights > 0, batch.has_each(THREE))


def test_a_backbone_of_parts_that_were_replaced_still_masks(make_config, make_batch, wake) -> None:
    """Adapters on an attention that had to be replaced (open_clip's), within Early Intervention."""
    from ei.models import EarlyIntervention

    def adapted() -> Backbone:
        backbone = open_clip_default()
        mor.inject(backbone.vit, "all")
        return backbone

    model = EarlyIntervention({m: adapted() for m in "ab"}, {m: adapted() for m in "ab"}, 4, int_hidden=8)
    wake(model)
    assert isinstance(model.primary["modality_a"].backbone.vit.transformer.resblocks[0].attn, nn.MultiheadAttention)
    batch = make_batch(a=(1, 1, 0), b=(1, 0, 2))
    found = model(batch).modality_logits
    for name, row in (("a", 1), ("b", 2)):
        branch = of(model, "primary", name)
        count = int(batch.present[name][row].sum())
        expected = branch.head(branch.backbone(batch.images[name][row, :count]).mean(0))
        torch.testing.assert_close(found[name][row], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.fault("two processes whose batches lack different modalities", "no process waits; the gradients of one")
def test_no_process_waits_for_another() -> None:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "missing_in_two_processes.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert result.returncode == 0 and "the same gradients" in result.stdout, result.stderr[-3000:]
