"""What all baselines have in common: outputs, missing modalities, gradients, learning."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mor
from ei.baselines import BASELINES
from ei.data.sample import Batch
from ei.losses import loss_terms, shares
from ei.models import Classifier, Output, count_trainable
from ei.runs.checkpoint import read_checkpoint, restore, trained_state, write_checkpoint

HAS_TRANSFORMERS = find_spec("transformers") is not None
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(name == "mmrad" and not HAS_TRANSFORMERS, reason="needs transformers"))
    for name in BASELINES
]
THREE = ("cfp", "faf", "oct")
PATTERNS = {"all": ["cfo"] * 4, "mixed": ["cfo", "c", "fo", "cf"], "no oct": ["cf", "c", "f", "cf"]}
COUNTS = {"cfp": (1, 2, 1, 1), "faf": (1, 1, 3, 2), "oct": (2, 1, 1, 1)}
# By construction these see the other samples of the batch, or the loss is about them.
OF_THE_BATCH = {"contrastive"}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, build: Callable[..., Classifier]) -> Classifier:
    return build(name, THREE)


def having(make_batch: Callable[..., Batch], pattern: list[str]) -> Batch:
    return make_batch(
        **{
            modality: [count if modality[0] in has else 0 for count, has in zip(each, pattern, strict=True)]
            for modality, each in COUNTS.items()
        }
    )


@pytest.fixture(params=PATTERNS.values(), ids=list(PATTERNS))
def batch(make_batch: Callable[..., Batch], request: pytest.FixtureRequest) -> Batch:
    """Four samples with one to three images of each modality that they have."""
    return having(make_batch, request.param)


def alone(batch: Batch, row: int) -> Batch:
    return Batch(
        images={name: images[[row]] for name, images in batch.images.items()},
        present={name: present[[row]] for name, present in batch.present.items()},
        ids=[batch.ids[row]],
    )


def parts(output: Output, has: Tensor) -> dict[str, Tensor]:
    """What an output says of what is there."""
    found = {"logits": output.logits}
    if output.modality_weights is not None:
        found["weights"] = output.modality_weights
    for column, (name, logits) in enumerate(output.modality_logits.items()):
        found[name] = logits * has[:, column, None]
    return found | {name: values for name, values in output.penalties.items() if name not in OF_THE_BATCH}


def total(output: Output, batch: Batch) -> Tensor:
    assert batch.labels is not None
    share = shares([batch])[0]
    return loss_terms(output, batch.labels, aux_weight=0.3, gate_weight=0.1, gate_prior=None, shares=share)["total"]


def test_output(model: Classifier, name: str, batch: Batch) -> None:
    output = model(batch)
    assert output.logits.shape == (4, 4) and output.logits.isfinite().all()
    assert all(values.shape == (4,) and (values >= 0).all() for values in output.penalties.values())
    assert set(output.modality_logits) in (set(), set(THREE))
    if output.modality_weights is not None:
        assert torch.equal(output.modality_weights > 0, batch.has_each(THREE))
        torch.testing.assert_close(output.modality_weights.sum(1), torch.ones(4))


def test_parts_add_up(model: Classifier) -> None:
    everything = sum(item.numel() for item in model.parameters() if item.requires_grad)
    assert count_trainable(model)["total"] == everything > 0


@pytest.mark.parametrize("train", [True, False])
def test_a_batch_equals_its_samples_one_by_one(model: Classifier, batch: Batch, train: bool) -> None:
    """So an absent modality, which some other sample of the batch may have, has no part."""
    model.train(train)
    has = batch.has_each(THREE)
    with torch.set_grad_enabled(train):
        together = parts(model(batch), has)
        singly = [parts(model(alone(batch, row)), has[[row]]) for row in range(4)]
    for part, values in together.items():
        torch.testing.assert_close(values, torch.cat([one[part] for one in singly]), rtol=1e-3, atol=1e-4, msg=part)


def test_what_is_not_there_is_never_looked_at(model: Classifier, make_batch: Callable[..., Batch]) -> None:
    batch = having(make_batch, PATTERNS["mixed"])
    poisoned = {name: images.clone() for name, images in batch.images.items()}
    for name, images in poisoned.items():
        images[~batch.present[name]] = float("nan")
    learned = list(mor.trainable_parameters(model).values())
    found = []
    for given in (batch, replace(batch, images=poisoned)):
        loss = total(model(given), batch)
        found.append([loss.detach(), *torch.autograd.grad(loss, learned)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_every_trained_parameter_has_a_gradient(model: Classifier, batch: Batch) -> None:
    """Zero where nobody has the modality; and without one, other processes would wait for it."""
    total(model(batch), batch).backward()
    gradients = {name: parameter.grad for name, parameter in mor.trainable_parameters(model).items()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    if batch.has_each(THREE).all():
        # A softmax over keys does not see what all keys have in common, so a bias of keys alone changes nothing.
        still = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
        assert not [name for name in still if not name.endswith("k_proj.bias")]


def test_full_tuning_reaches_all_of_the_backbones(
    name: str, build: Callable[..., Classifier], make_batch: Callable[..., Batch]
) -> None:
    model, batch = build(name, adapter="full"), make_batch(cfp=(1, 2), oct=(1, 1))
    total(model(batch), batch).backward()
    assert all(item.grad is not None and item.grad.isfinite().all() for item in model.parameters())
    modules = [module for module in model.modules() if hasattr(module, "patch_tokens")]
    assert modules and all(module.vit.patch_embed.proj.weight.grad.any() for module in modules)


def test_a_sample_needs_something(model: Classifier, make_batch: Callable[..., Batch]) -> None:
    with pytest.raises(ValueError, match="must have an image of modality .* have none: patient-1"):
        model(make_batch(cfp=(1, 0), faf=(1, 0), oct=(0, 0)))


def test_there_must_be_two_modalities(name: str, build: Callable[..., Classifier]) -> None:
    with pytest.raises(ValueError, match=r"modalities must be at least two to be fused, got \['oct'\]"):
        build(name, ("oct",))


@pytest.mark.parametrize(("fusion", "width"), [("cross", 16), ("sfusion", 64), ("raddiag", 64), ("mmrad", 32)])
def test_heads_divide_the_width(build: Callable[..., Classifier], fusion: str, width: int) -> None:
    """MMRAD's are those of its narrower attention."""
    with pytest.raises(ValueError, match=f"^{fusion}_heads must divide the width of the attention, {width}, got 5$"):
        build(fusion, **{f"{fusion}_heads": 5})


def test_it_learns(name: str, build: Callable[..., Classifier], make_batch: Callable[..., Batch]) -> None:
    """Eight samples by heart, some of which lack a modality: the loss falls over 20 steps, by a quarter at least."""
    model, batch = build(name), make_batch(cfp=(1, 1, 1, 1, 1, 0, 1, 1), oct=(1, 2, 0, 1, 1, 1, 1, 1))
    optimizer = torch.optim.AdamW(mor.trainable_parameters(model).values(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = total(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
    assert min(losses[10:]) < min(losses[:10])


def test_bf16_autocast(model: Classifier, make_batch: Callable[..., Batch]) -> None:
    batch = having(make_batch, PATTERNS["mixed"])
    model.eval()
    with torch.no_grad():
        exact = model(batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(batch).logits
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


def test_evaluation_draws_nothing(model: Classifier, make_batch: Callable[..., Batch]) -> None:
    batch = having(make_batch, PATTERNS["mixed"])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(batch).logits, model(batch).logits)


def test_a_checkpoint_is_all_that_was_learned(
    name: str, build: Callable[..., Classifier], make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    """On the same frozen weights, whatever else was drawn, the same bits."""
    model, batch = build(name).eval(), make_batch(cfp=(1, 2, 0), oct=(1, 0, 1))
    write_checkpoint(tmp_path / "best.safetensors", trained_state(model), {})
    other = build(name).eval()
    frozen = {key: item for key, item in model.named_parameters() if not item.requires_grad}
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(frozen[key])
    stored = read_checkpoint(tmp_path / "best.safetensors").parameters
    restore(other, stored)
    with torch.no_grad():
        assert torch.equal(model(batch).logits, other(batch).logits)
    assert stored.keys() == {key for key, item in model.named_parameters() if item.requires_grad}
    # Of frozen backbones with adapters, nothing but the adapters.
    assert all("mor_" in key for key in stored if ".backbone." in key)


def test_any_name_of_a_modality(name: str, build: Callable[..., Classifier], make_batch: Callable[..., Batch]) -> None:
    """Such as those of attributes of modules."""
    model = build(name, ("keys", "T1 1.5 T"))
    output = model(make_batch(**{"keys": (1, 0), "T1 1.5 T": (1, 1)}))
    assert output.logits.isfinite().all()
