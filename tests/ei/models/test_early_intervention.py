"""Early Intervention: who tells whom what, and where gradients go."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import mor
from ei.models import EarlyIntervention, build_model, load_backbone
from ei.models.backbone import adapted
from ei.models.early_intervention import int_adapter
from ei.models.fusion import module_key

THREE = ("cfp", "faf", "oct")


@pytest.fixture
def model(make_config) -> EarlyIntervention:
    return build_model(make_config(), num_classes=4)


def of(model: EarlyIntervention, role: str, modality: str):
    return getattr(model, role)[module_key(modality)]


def changed(batch, modality: str):
    return replace(batch, images=batch.images | {modality: batch.images[modality] + 1})


def test_output_for_ragged_images(make_config, make_batch) -> None:
    model = build_model(make_config(THREE), num_classes=4)
    output = model(make_batch(cfp=(1, 2), faf=(3, 1), oct=(1, 1)))
    assert output.logits.shape == (2, 4) and output.modality_weights.shape == (2, 3)
    for each in (output.modality_logits, output.aux_logits):
        assert list(each) == list(THREE) and all(logits.shape == (2, 4) for logits in each.values())


def test_is_the_method_written_out(make_config, make_batch, wake) -> None:
    model = build_model(make_config(THREE), num_classes=4)
    wake(model)
    batch = make_batch(cfp=(1, 1), faf=(1, 1), oct=(1, 1))
    images = {name: batch.images[name][:, 0] for name in THREE}
    output = model(batch)
    aux = {name: of(model, "auxiliary", name).backbone(images[name]) for name in THREE}
    primary = {}
    for target in THREE:
        adapters = of(model, "int_adapters", target)
        tokens = [adapters[module_key(name)](aux[name]) for name in THREE if name != target]
        primary[target] = of(model, "primary", target).backbone(images[target], torch.stack(tokens, 1))
        torch.testing.assert_close(output.aux_logits[target], of(model, "auxiliary", target).head(aux[target]))
        torch.testing.assert_close(output.modality_logits[target], of(model, "primary", target).head(primary[target]))
    weights = torch.softmax(model.fusion.gate(torch.cat([primary[name] for name in THREE], 1)), 1)
    torch.testing.assert_close(output.modality_weights, weights)
    expected = sum(weights[:, [m]] * output.modality_logits[name] for m, name in enumerate(THREE))
    torch.testing.assert_close(output.logits, expected)


def test_a_branch_depends_on_the_other_modality(model: EarlyIntervention, make_batch) -> None:
    batch = make_batch()
    before, after = model(batch), model(changed(batch, "oct"))
    assert (before.modality_logits["cfp"] - after.modality_logits["cfp"]).abs().max() > 1e-4
    assert torch.equal(before.aux_logits["cfp"], after.aux_logits["cfp"])


def test_all_images_of_a_sample_get_one_summary_of_all_reference_images(model: EarlyIntervention, make_batch) -> None:
    tokens: list[torch.Tensor] = []
    insert = of(model, "primary", "cfp").backbone._insert
    of(model, "primary", "cfp").backbone._insert = lambda x, each: tokens.append(each) or insert(x, each)
    batch = make_batch(cfp=(3, 1), oct=(2, 2))
    model(batch)
    (summary,) = of(model, "auxiliary", "oct").summaries(batch)
    expected = of(model, "int_adapters", "cfp")[module_key("oct")](summary)
    torch.testing.assert_close(tokens[0], expected[torch.tensor([0, 0, 0, 1])][:, None])


@pytest.mark.parametrize("awake", [False, True])
def test_the_target_teaches_the_references_auxiliary_vit(
    model: EarlyIntervention, make_batch, gradient_of, wake, awake: bool
) -> None:
    if awake:
        wake(model)
    loss = model(make_batch()).modality_logits["cfp"].square().sum()
    assert gradient_of(loss, of(model, "auxiliary", "oct").backbone) > 0
    assert gradient_of(loss, of(model, "int_adapters", "cfp")) > 0
    assert gradient_of(loss, of(model, "primary", "cfp").backbone) > 0
    for role, modality in (("auxiliary", "cfp"), ("primary", "oct"), ("int_adapters", "oct")):
        assert gradient_of(loss, of(model, role, modality)) == 0
    if awake:
        for name, parameter in mor.trainable_parameters(of(model, "auxiliary", "oct").backbone).items():
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("detach", [True, False])
def test_what_the_fused_loss_reaches(make_config, make_batch, gradient_of, wake, detach: bool) -> None:
    model = build_model(make_config(detach_fusion=detach), 4)
    wake(model)
    loss = model(make_batch()).logits.square().sum()
    assert gradient_of(loss, model.fusion) > 0
    for role in ("primary", "auxiliary", "int_adapters"):
        for modality in ("cfp", "oct"):
            assert (gradient_of(loss, of(model, role, modality)) == 0) == detach, (role, modality)


def test_order_of_the_references_does_not_matter(make_config, make_batch) -> None:
    batch = make_batch(cfp=(1, 1), faf=(1, 1), oct=(1, 1))
    first = build_model(make_config(THREE), 4)
    second = build_model(make_config(("oct", "cfp", "faf")), 4)
    weights = {name: value for name, value in first.state_dict().items() if not name.startswith("fusion.")}
    second.load_state_dict(weights | {f"fusion.{key}": value for key, value in second.fusion.state_dict().items()})
    one, other = first(batch).modality_logits, second(batch).modality_logits
    for name in THREE:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_int_from_changes_what_is_told_and_not_the_auxiliary_logits(make_config, make_batch, gradient_of, wake) -> None:
    batch, outputs = make_batch(), []
    state = build_model(make_config(), 4).state_dict()
    for block in (0, 4, 2):
        model = build_model(make_config(int_from=block), 4)
        model.load_state_dict(state)
        outputs.append(model(batch))
    last, fourth, second = outputs
    for name in ("cfp", "oct"):
        assert torch.equal(fourth.modality_logits[name], last.modality_logits[name])
        assert not torch.equal(second.modality_logits[name], last.modality_logits[name])
        assert torch.equal(second.aux_logits[name], last.aux_logits[name])
    # What is told comes from the first two blocks alone.
    blocks = of(model, "auxiliary", "oct").backbone.vit.blocks
    loss = second.modality_logits["cfp"].square().sum()
    assert [gradient_of(loss, block) > 0 for block in blocks] == [True, True, False, False]


def test_int_at_is_the_block_where_tokens_enter(make_config, make_batch) -> None:
    lengths = []
    model = build_model(make_config(int_at=3), 4)
    for block in of(model, "primary", "cfp").backbone.vit.blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model(make_batch())
    assert lengths == [17, 17, 17, 18]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"int_at": 4}, r"enter before one of the ViT's blocks 0\.\.3, got 4"),
        ({"int_from": 5}, r"read after one of the ViT's blocks 1\.\.4, or 0 for the last, got 5"),
    ],
)
def test_positions_are_checked_when_the_model_is_built(make_config, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(make_config(**settings), 4)


def test_backbones_must_match(trunk) -> None:
    with pytest.raises(ValueError, match=r"for each of \['a', 'b'\], it has them for \['a'\]"):
        EarlyIntervention({"a": trunk, "b": trunk}, {"a": trunk}, 4)


def test_auxiliary_vits_may_be_of_another_width(trunk, make_batch, make_config) -> None:
    small = load_backbone(replace(make_config().model, backbone="test_vit", pretrained=False), 8)
    assert small.depth != trunk.depth
    model = EarlyIntervention({"cfp": trunk, "oct": small}, {"cfp": small, "oct": trunk}, 4, int_hidden=16)
    assert model(make_batch()).logits.shape == (3, 4)


def test_int_adapter() -> None:
    layers = list(int_adapter(8, 16, 32))
    assert [type(layer) for layer in layers] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert (layers[1].in_features, layers[1].out_features, layers[3].out_features) == (8, 16, 32)


def test_frozen_weights_are_held_once_however_many_modalities(make_config, trunk) -> None:
    base = {parameter.data_ptr() for parameter in trunk.parameters()}
    for modalities in (("a", "b"), ("a", "b", "c", "d", "e")):
        model = build_model(make_config(modalities), 4, trunk=trunk)
        frozen = {item.data_ptr() for item in model.parameters() if not item.requires_grad}
        assert frozen == base
        trained = [item.data_ptr() for item in model.parameters() if item.requires_grad]
        assert len(set(trained)) == len(trained)
        roles = 2 * len(modalities)
        assert sum("mor_B" in name for name, _ in model.named_parameters()) == roles * 4 * 2


def test_start_from_reproduces_stage_1_in_the_auxiliary_vits(make_config, make_batch, wake) -> None:
    config, batch = make_config(), make_batch()
    model = build_model(config, 4)
    stage1 = {}
    for name in config.data.modalities:
        alone = UniModalOf(model, config, name)
        wake(alone)
        stage1[name] = alone
    heads = {name: of(model, "primary", name).head.weight.clone() for name in stage1}
    model.start_from({name: mor.trainable_parameters(alone) for name, alone in stage1.items()})
    output = model(batch)
    for name, alone in stage1.items():
        assert torch.equal(output.aux_logits[name], alone(batch).logits)
        learned = mor.trainable_parameters(alone.backbone)
        primary = of(model, "primary", name)
        assert all(torch.equal(primary.backbone.get_parameter(key), value) for key, value in learned.items())
        assert torch.equal(primary.head.weight, heads[name])
    # Copies, not the same tensors: stage 2 trains them apart.
    pointers = [parameter.data_ptr() for parameter in mor.trainable_parameters(model).values()]
    assert len(set(pointers)) == len(pointers)


def UniModalOf(model: EarlyIntervention, config, name: str):
    """A stage-1 model on the frozen weights of ``model``."""
    alone = build_model(config, 4, modality=name)
    shared = of(model, "primary", name).backbone.state_dict()
    frozen = {key: value for key, value in shared.items() if "mor_" not in key}
    alone.backbone.load_state_dict(frozen, strict=False)
    return alone


def test_shared_adapters_are_one_vit_in_both_roles(make_config, make_batch, wake, gradient_of) -> None:
    """What the auxiliary pass says is what the primary ViT would say without tokens; both roles teach it."""
    model = build_model(make_config(share_adapters=True), 4)
    wake(model)
    batch = make_batch(cfp=(1, 1), oct=(1, 1))
    output = model(batch)
    for name in ("cfp", "oct"):
        primary, auxiliary = of(model, "primary", name), of(model, "auxiliary", name)
        assert primary.backbone is auxiliary.backbone and primary.head is not auxiliary.head
        expected = auxiliary.head(primary.backbone(batch.images[name][:, 0]))
        torch.testing.assert_close(output.aux_logits[name], expected)
        for logits in (output.aux_logits[name], output.modality_logits[name]):
            assert gradient_of(logits.square().sum(), primary.backbone) > 0
    assert of(model, "primary", "cfp").backbone is not of(model, "primary", "oct").backbone
    own = build_model(make_config(), 4)
    assert not {id(item) for item in own.auxiliary.parameters() if item.requires_grad} & {
        id(item) for item in own.primary.parameters()
    }


def test_shared_adapters_start_from_stage_1(make_config, make_batch, wake) -> None:
    config, batch = make_config(share_adapters=True), make_batch()
    model = build_model(config, 4)
    alone = {name: UniModalOf(model, config, name) for name in config.data.modalities}
    for each in alone.values():
        wake(each)
    model.start_from({name: mor.trainable_parameters(each) for name, each in alone.items()})
    output = model(batch)
    assert all(torch.equal(output.aux_logits[name], each(batch).logits) for name, each in alone.items())


def test_auxiliary_vits_of_their_own_start_from_a_stage_1_of_their_own(make_config, make_batch, wake) -> None:
    config, batch = make_config(aux_backbone="vit_tiny_patch16_224", pretrained=False), make_batch()
    trunk, aux_trunk = load_backbone(config.model, 8), load_backbone(config.model.auxiliary, 8)
    model = build_model(config, 4, trunk=trunk, aux_trunk=aux_trunk)
    assert (trunk.width, aux_trunk.width, of(model, "auxiliary", "oct").backbone.width) == (64, 192, 192)
    stage1, own = (
        {name: build_model(each, 4, modality=name, trunk=weights) for name in config.data.modalities}
        for each, weights in ((config, trunk), (config.auxiliary, aux_trunk))
    )
    for each in (*stage1.values(), *own.values()):
        wake(each)
    learned, learned_by_own = (
        {name: mor.trainable_parameters(each) for name, each in group.items()} for group in (stage1, own)
    )
    with pytest.raises(ValueError, match="do not fit of 'cfp'"):
        model.start_from(learned)
    with pytest.raises(ValueError, match=r"modalities \['cfp', 'oct'\], got it for \['oct'\]"):
        model.start_from(learned, {"oct": learned_by_own["oct"]})
    model.start_from(learned, learned_by_own)
    output = model(batch)
    for name in config.data.modalities:
        assert torch.equal(output.aux_logits[name], own[name](batch).logits)
        primary = of(model, "primary", name).backbone
        assert all(
            torch.equal(primary.get_parameter(key[9:]), value) for key, value in learned[name].items() if key[0] == "b"
        )


def test_stage_1_that_does_not_fit_is_told_at_once_and_changes_nothing(make_config) -> None:
    model = build_model(make_config(), 4)
    stage1 = {name: mor.trainable_parameters(build_model(make_config(), 3, modality=name)) for name in ("cfp", "oct")}
    del stage1["oct"]["head.bias"]
    stage1["cfp"]["surplus"] = torch.zeros(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as misfit:
        model.start_from(stage1)
    assert str(misfit.value) == (
        "the parameters of stage 1 do not fit of 'cfp': unexpected: surplus; of another shape:"
        " head.weight (3, 64) where (4, 64) is expected, head.bias (3,) where (4,) is expected;"
        " of 'oct': missing: head.bias; of another shape: head.weight (3, 64) where (4, 64) is expected"
    )
    with pytest.raises(ValueError, match=r"for the modalities \['cfp', 'oct'\], got it for \['oct'\]"):
        model.start_from({"oct": stage1["oct"]})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("adapter", ["mor", "frozen", "full"])
def test_state_dict_round_trip(make_config, make_batch, wake, adapter: str) -> None:
    first, second = (build_model(make_config(adapter=adapter), 4) for _ in range(2))
    wake(first)
    batch = make_batch()
    assert not torch.equal(first(batch).logits, second(batch).logits)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(batch).logits, second(batch).logits)


def test_trained_parameters_are_enough_on_the_same_trunk(make_config, make_batch, wake, trunk) -> None:
    first, second = (build_model(make_config(), 4, trunk=trunk) for _ in range(2))
    wake(first)
    trained = {name: value.detach().clone() for name, value in mor.trainable_parameters(first).items()}
    missing, unexpected = second.load_state_dict(trained, strict=False)
    assert not unexpected and all("mor_" not in name for name in missing)
    assert torch.equal(first(make_batch()).logits, second(make_batch()).logits)


def test_every_trained_parameter_gets_a_gradient_from_the_branches(make_config, make_batch, wake) -> None:
    model = build_model(make_config(int_from=2, int_at=1), 4)
    wake(model)
    output = model(make_batch())
    each = [output.logits, *output.modality_logits.values(), *output.aux_logits.values()]
    sum(logits.square().sum() for logits in each).backward()
    assert [name for name, item in mor.trainable_parameters(model).items() if item.grad is None] == []


def test_trees_of_one_trunk_are_trained_apart(make_config, trunk) -> None:
    backbones = [adapted(trunk, make_config().model) for _ in range(2)]
    with torch.no_grad():
        for parameter in mor.trainable_parameters(backbones[0]).values():
            parameter.fill_(1)
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(backbones[1](images), trunk(images)) and not torch.equal(backbones[0](images), trunk(images))
