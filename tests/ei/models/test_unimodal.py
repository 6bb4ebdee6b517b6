"""One modality alone: which images count, and how."""

from dataclasses import replace

import pytest
import torch

from ei.config import ModelConfig
from ei.models.backbone import adapted
from ei.models.unimodal import UniModal, mean_over_images
from ei.models.vit import Backbone


@pytest.fixture
def model(trunk: Backbone) -> UniModal:
    return UniModal(adapted(trunk, ModelConfig()), "oct", num_classes=4)


def test_output(model: UniModal, make_batch) -> None:
    output = model(make_batch(oct=(3, 1, 2)))
    assert output.logits.shape == (3, 4)
    assert list(output.modality_logits) == ["oct"] and output.modality_logits["oct"] is output.logits
    assert output.aux_logits == {} and output.modality_weights is None


def test_a_sample_is_the_mean_of_its_images(model: UniModal, make_batch) -> None:
    batch = make_batch(oct=(3, 1, 2))
    (summary,) = model.summaries(batch)
    for row, count in enumerate((3, 1, 2)):
        expected = model.backbone(batch.images["oct"][row, :count]).mean(0)
        torch.testing.assert_close(summary[row], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(batch).logits, model.head(summary), rtol=0, atol=0)


def test_padding_is_never_looked_at(model: UniModal, make_batch) -> None:
    batch = make_batch(oct=(3, 1, 2))
    poisoned = batch.images["oct"].clone()
    poisoned[~batch.present["oct"]] = float("nan")
    assert torch.equal(model(replace(batch, images={"oct": poisoned})).logits, model(batch).logits)


def test_only_present_images_pass_through_the_vit(model: UniModal, make_batch) -> None:
    sizes = []
    model.backbone.vit.patch_embed.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    model(make_batch(oct=(3, 1, 2)))
    assert sizes == [6]


def test_every_image_gets_the_tokens_of_its_sample(model: UniModal, make_batch) -> None:
    batch, tokens = make_batch(oct=(3, 1, 2)), torch.randn(3, 2, 64)
    (summary,) = model.summaries(batch, tokens)
    for row, count in enumerate((3, 1, 2)):
        expected = model.backbone(batch.images["oct"][row, :count], tokens[row].expand(count, -1, -1)).mean(0)
        torch.testing.assert_close(summary[row], expected, rtol=1e-5, atol=1e-6)


def test_gaps_between_images_are_allowed() -> None:
    present = torch.tensor([[True, False, True], [False, True, False]])
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    assert mean_over_images(values, present).tolist() == [[2.0, 3.0], [9.0, 9.0]]


def test_samples_without_an_image_are_named(model: UniModal, make_batch) -> None:
    batch = make_batch(oct=(0, 1, 0))
    with pytest.raises(ValueError, match="image of modality 'oct', these have none: patient-0, patient-2$"):
        model(batch)
    with pytest.raises(ValueError, match="these have none: row 0, row 2$"):
        model(replace(batch, ids=[]))


def test_a_batch_without_the_modality(model: UniModal, make_batch) -> None:
    with pytest.raises(ValueError, match=r"images of modality 'oct', it has those of \['cfp'\]"):
        model(make_batch(cfp=(1, 1)))


def test_adapters_and_head_are_what_learns(model: UniModal, make_batch) -> None:
    model(make_batch(oct=(1, 2))).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("mor_" in name or name.startswith("head.")), name


def test_bf16_autocast(model: UniModal, make_batch) -> None:
    batch = make_batch(oct=(2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch).logits
    torch.testing.assert_close(rounded.float(), model(batch).logits, rtol=0.05, atol=0.05)
