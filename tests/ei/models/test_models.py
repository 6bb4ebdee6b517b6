"""From a configuration to a model."""

from typing import get_args

import pytest

from ei.config import TWO_STAGES, Fusion, ModelConfig
from ei.models import MODELS, EarlyIntervention, LateFusion, UniModal, build_model
from ei.models import backbone as backbone_module


def test_every_way_of_fusing_has_a_model(make_config) -> None:
    kinds = {name: type(build_model(make_config(fusion=name), 2)) for name in MODELS}
    assert list(kinds) == list(get_args(Fusion))
    two_stages = {name for name, kind in kinds.items() if issubclass(kind, LateFusion)}
    assert two_stages == set(TWO_STAGES)
    assert (kinds["ei"], kinds["late"]) == (EarlyIntervention, LateFusion)
    assert type(build_model(make_config(), 2, modality="oct")) is UniModal


def test_settings_arrive(make_config) -> None:
    model = build_model(make_config(int_hidden=7, int_from=3, int_at=2, detach_fusion=False, adapter="lora"), 2)
    assert (model.int_from, model.int_at, model.fusion.detach) == (3, 2, False)
    shapes = {tuple(item.shape) for name, item in model.named_parameters() if name.startswith("int_adapters")}
    assert (7, 64) in shapes
    assert {item.shape[0] for name, item in model.named_parameters() if name.endswith("mor_A")} == {4}


def test_a_trunk_is_loaded_once_per_model_and_not_at_all_if_given(make_config, trunk, monkeypatch) -> None:
    loads = []
    load = backbone_module.load_backbone
    monkeypatch.setattr("ei.models.load_backbone", lambda *given: loads.append(given) or load(*given))
    build_model(make_config(("a", "b", "c")), 2)
    assert [config.backbone for config, _ in loads] == ["tiny"]
    stage1 = build_model(make_config(), 2, modality="oct", trunk=trunk)
    stage2 = build_model(make_config(), 2, trunk=trunk)
    assert len(loads) == 1
    frozen = [{id(item) for item in each.parameters() if not item.requires_grad} for each in (stage1, stage2, trunk)]
    assert frozen[0] == frozen[1] == frozen[2]


def test_an_auxiliary_backbone_is_loaded_once_or_not_at_all_if_given(make_config, trunk, monkeypatch) -> None:
    loads = []
    load = backbone_module.load_backbone
    monkeypatch.setattr("ei.models.load_backbone", lambda *given: loads.append(given[0].backbone) or load(*given))
    config = make_config(aux_backbone="vit_tiny_patch16_224", pretrained=False)
    model = build_model(config, 2)
    assert loads == ["tiny", "vit_tiny_patch16_224"]
    build_model(config, 2, modality="oct")
    assert loads == ["tiny", "vit_tiny_patch16_224", "tiny"]
    build_model(config, 2, trunk=trunk, aux_trunk=trunk)
    assert len(loads) == 3
    frozen = [
        {id(item) for item in getattr(model, role).parameters() if not item.requires_grad}
        for role in ("primary", "auxiliary")
    ]
    assert not frozen[0] & frozen[1]
    with pytest.raises(ValueError, match="after one of the ViT's blocks 1..12, or 0 for the last, got 13"):
        build_model(make_config(aux_backbone="vit_tiny_patch16_224", pretrained=False, int_from=13), 2)


def test_bad_arguments(make_config) -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1 and at most 1000000, got 0"):
        build_model(make_config(), 0)
    with pytest.raises(ValueError, match=r"modality must be one of \['cfp', 'oct'\], got 'mri'"):
        build_model(make_config(), 2, modality="mri")
    with pytest.raises(ValueError, match="must be at least two"):
        build_model(make_config(()), 2)


def test_configuration_allows_no_other_way_of_fusing() -> None:
    with pytest.raises(ValueError, match="fusion must be one of ei, late, mm-mil, .*, got 'other'"):
        ModelConfig(fusion="other")
