"""The gate over modalities, and late fusion without intervention."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import mor
from ei.models import LateFusion, UniModal, build_model
from ei.models.fusion import ModalityFusion, module_key

ODD_NAMES = ("T1 1.5 T", "keys", "T1 1%2E5 T", "forward", "ä/b")


@pytest.fixture
def model(make_config) -> LateFusion:
    return build_model(make_config(fusion="late"), num_classes=4)


def test_fusion_is_the_weighted_sum() -> None:
    fusion = ModalityFusion([4, 6])
    summaries, logits = [torch.randn(3, 4), torch.randn(3, 6)], [torch.randn(3, 5), torch.randn(3, 5)]
    fused, weights = fusion(summaries, logits)
    scores = torch.cat(summaries, 1) @ fusion.gate.weight.T + fusion.gate.bias
    torch.testing.assert_close(weights, scores.exp() / scores.exp().sum(1, keepdim=True))
    torch.testing.assert_close(fused, weights[:, :1] * logits[0] + weights[:, 1:] * logits[1])


def test_weights_are_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, weights = ModalityFusion([4, 4])([torch.randn(2, 4)] * 2, [torch.randn(2, 3).bfloat16()] * 2)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("detach", [True, False])
def test_detach(detach: bool) -> None:
    fusion = ModalityFusion([4, 4], detach=detach)
    inputs = [torch.randn(2, width, requires_grad=True) for width in (4, 4, 3, 3)]
    fusion(inputs[:2], inputs[2:])[0].square().sum().backward()
    assert fusion.gate.weight.grad.abs().max() > 0
    assert all((tensor.grad is None) == detach for tensor in inputs)


def test_output(model: LateFusion, make_batch) -> None:
    output = model(make_batch())
    assert output.logits.shape == (3, 4) and output.modality_weights.shape == (3, 2)
    assert list(output.modality_logits) == ["cfp", "oct"] and output.aux_logits == {}
    torch.testing.assert_close(output.modality_weights.sum(1), torch.ones(3))


def test_a_branch_does_not_depend_on_other_modalities(model: LateFusion, make_batch) -> None:
    batch = make_batch()
    other = replace(batch, images=batch.images | {"oct": batch.images["oct"] + 1})
    before, after = model(batch), model(other)
    assert torch.equal(before.modality_logits["cfp"], after.modality_logits["cfp"])
    assert not torch.equal(before.modality_logits["oct"], after.modality_logits["oct"])


def test_columns_follow_the_order_of_the_configuration(make_config, make_batch) -> None:
    model = build_model(make_config(("oct", "cfp"), fusion="late"), 4)
    with torch.no_grad():
        model.fusion.gate.weight.zero_()
        model.fusion.gate.bias.copy_(torch.tensor([50.0, 0.0]))
    output = model(make_batch())
    assert list(output.modality_logits) == ["oct", "cfp"]
    torch.testing.assert_close(output.logits, output.modality_logits["oct"])


def test_start_from_takes_the_adapters_and_leaves_the_head_new(make_config, wake) -> None:
    config = make_config(fusion="late")
    stage1 = {name: build_model(config, 4, modality=name) for name in config.data.modalities}
    for each in stage1.values():
        wake(each)
    model = build_model(config, 4)
    heads = [module.head.weight.clone() for module in model.primary.values()]
    model.start_from({name: mor.trainable_parameters(each) for name, each in stage1.items()})
    for name, head in zip(config.data.modalities, heads, strict=True):
        primary = model.primary[module_key(name)]
        learned = mor.trainable_parameters(stage1[name].backbone)
        assert all(torch.equal(primary.backbone.get_parameter(key), value) for key, value in learned.items())
        assert torch.equal(primary.head.weight, head)


def test_one_modality_cannot_be_fused(make_config) -> None:
    with pytest.raises(ValueError, match=r"modalities must be at least two to be fused, got \['oct'\]"):
        build_model(make_config(("oct",), fusion="late"), 4)


def test_module_keys_are_distinct_and_safe() -> None:
    keys = [module_key(name) for name in ODD_NAMES]
    assert len(set(keys)) == len(ODD_NAMES) and not any("." in key for key in keys)
    attributes = set(dir(nn.ModuleDict())) | set(dir(UniModal))
    assert not attributes & {module_key(name) for name in attributes}


@pytest.mark.parametrize("fusion", ["late", "ei"])
def test_any_names_of_modalities(make_config, make_batch, fusion: str) -> None:
    model = build_model(make_config(ODD_NAMES, fusion=fusion), 2)
    output = model(make_batch(**{name: (1, 2) for name in ODD_NAMES}))
    assert tuple(output.modality_logits) == ODD_NAMES and output.modality_weights.shape == (2, 5)
    assert set(model.state_dict()) == set(dict(model.named_parameters(remove_duplicate=False)))
