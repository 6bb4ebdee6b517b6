"""Methods by name: what each changes, and that it changes nothing else."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ei.comparison.methods import find_method, find_methods, settings_of, stage1_key
from ei.config import Config, DataConfig, ModelConfig, TrainConfig

BASE = Config(data=DataConfig(modalities=("cfp", "oct")), model=ModelConfig(backbone="tiny"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ei", {"fusion": "ei"}),
        ("ei:frozen", {"fusion": "ei", "adapter": "frozen"}),
        ("ei:mor-no-bypass", {"fusion": "ei", "adapter": "mor", "bypass": False}),
        ("late:lora", {"fusion": "late", "adapter": "lora"}),
        ("late:average", {"fusion": "late-average"}),
        ("late:max:full", {"fusion": "late-max", "adapter": "full"}),
        ("late-weighted", {"fusion": "late-weighted"}),
        ("ei:peft:ia3", {"fusion": "ei", "adapter": "peft:ia3"}),
        ("mm-mil", {"fusion": "mm-mil", "adapter": "full"}),
        ("mm-mil:mor", {"fusion": "mm-mil", "adapter": "mor"}),
        ("mmrad", {"fusion": "mmrad", "adapter": "frozen"}),
        ("unimodel", {"fusion": "unimodel", "adapter": "mor"}),
    ],
)
def test_what_a_name_changes(name: str, changes: dict) -> None:
    assert find_method(name).changes == {"model": changes}


@pytest.mark.parametrize("name", ["ei", "late", "ei:lora", "ei:loramoe", "ei:frozen", "late:full", "ei:mor-no-bypass"])
def test_one_protocol(name: str) -> None:
    """Whatever the shared settings are, a method's differ in what it says, and in what would be idle or another's."""
    model = ModelConfig(backbone="tiny", ranks=(1, 3), targets=("qkv",), int_hidden=7, dropout=0.1, share_adapters=True)
    base = Config(
        data=DataConfig(modalities=("cfp", "oct"), rotation=3, balance="auto"),
        model=model,
        train=TrainConfig(aux_weight=0.5, epochs=3, optimizer="adamw", lr=0.1, seed=4),
    )
    method = find_method(name)
    changed = settings_of(method.applied(base), base)
    says = method.changes["model"]
    assert {key: changed.get(key, vars(base.model)[key]) for key in says} == says
    of_adapter = {"ranks", "targets", "dropout"} if says.get("adapter", "mor") != "mor" else set()
    assert not of_adapter or of_adapter <= set(changed)
    idle = {"int_hidden", "share_adapters", "aux_weight"} if says["fusion"] == "late" else set()
    idle |= {"share_adapters"} if says.get("adapter") == "frozen" else set()
    assert set(changed) <= set(says) | of_adapter | idle


def test_a_method_without_another_adapter_keeps_the_shared_ranks() -> None:
    base = replace(BASE, model=replace(BASE.model, ranks=(1, 3)))
    assert find_method("late").applied(base).model.ranks == (1, 3)
    assert find_method("late:mor").applied(base).model.ranks == (1, 3)


def test_a_file_is_a_method(tmp_path: Path) -> None:
    path = tmp_path / "narrow <INT>.yaml"
    path.write_text("model: {int_hidden: 5}\ntrain: {lr: 0.01}\n")
    method = find_method(str(path))
    assert (method.name, method.folder) == ("narrow <INT>", "narrow %3CINT%3E")
    assert settings_of(method.applied(BASE), BASE) == {"int_hidden": 5, "lr": 0.01}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: 1}", "sets seed, which all methods"),
        ("data: {manifest: other.csv}", "sets manifest, which all methods"),
        ("5", "must hold sections"),
        ("model: 5", "must hold sections"),
        ("model: [", "cannot read the method"),
        ("model: {fusion: late, int_hidden: 5}", "with fusion 'late', int_hidden would change nothing"),
        ("model: {fusio: late}", "method 'm': unknown field of section 'model': fusio"),
        ("modle: {fusion: late}", "method 'm': unknown section: modle"),
    ],
)
def test_a_file_that_cannot_be_one(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_methods([str(path)], BASE)


@pytest.mark.parametrize("name", ["late", "late-max", "late:max", "mm-mil", "ei:lora", "uni:cfp"])
def test_a_file_called_as_another_method(name: str, tmp_path: Path) -> None:
    """Its row of the table would be taken for that method's."""
    path = tmp_path / f"{name}.yaml"
    path.write_text("model: {int_hidden: 5}")
    with pytest.raises(ValueError, match=f"is called as another method, '{name}'; rename the file"):
        find_methods([str(path)], BASE)
    path.rename(tmp_path / "late-and-narrow.yaml")
    assert find_methods([str(tmp_path / "late-and-narrow.yaml")], BASE)[0].name == "late-and-narrow"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one method"),
        (["ei", "eo"], "method 'eo': fusion must be"),
        (["ei:lroa"], "method 'ei:lroa': adapter must be"),
        (["ei", "ei:mor"], "'ei' and 'ei:mor' are the same"),
        (["ei", "ei"], "two methods are called 'ei'; leave one out"),
        (["ei:"], "method 'ei:' must name an adapter after the colon"),
        (["ei", "uni:mri"], "there is no modality 'mri', there are cfp, oct"),
        (["ei", "uni:"], "there is no modality '', there are cfp, oct"),
        (["ei", "uni:mri:lora"], "there is no modality 'mri', there are cfp, oct"),
        (["ei", "uni:cfp:"], "method 'uni:cfp:' must name an adapter after the colon, such as uni:cfp:lora"),
        (["ei", "uni:cfp:lroa"], "method 'uni:cfp:lroa': adapter must be"),
        (["ei", "uni:cfp", "uni:cfp:mor"], "'uni:cfp' and 'uni:cfp:mor' are the same"),
        (["nowhere.yaml"], "cannot read the method nowhere.yaml"),
        (["late:.."], "adapter must be"),
        ([".hidden"], "names of their own, without a dot first, got '.hidden'"),
    ],
)
def test_methods_that_cannot_be_compared(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_methods(names, BASE)


def test_modalities_whose_names_hold_colons() -> None:
    base = replace(BASE, data=replace(BASE.data, modalities=("t1", "t1:post", "lora")))
    found = find_methods(["uni:t1", "uni:t1:post", "uni:t1:lora", "uni:t1:post:lora", "uni:lora"], base)
    adapters = [(method.modality, method.applied(base).model.adapter) for method in found]
    assert adapters == [("t1", "mor"), ("t1:post", "mor"), ("t1", "lora"), ("t1:post", "lora"), ("lora", "mor")]


def test_methods_whose_folders_some_disks_take_for_one(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "wide.yaml", tmp_path / "b" / "Wide.yaml"]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(f"model: {{int_hidden: {number + 5}}}")
    with pytest.raises(ValueError, match="names of their own, .* got 'Wide'"):
        find_methods([str(path) for path in paths], BASE)


@pytest.mark.parametrize(
    "setting",
    [
        "data: {manifest: x}",
        "data: {modalities: [x]}",
        "data: {labels: [x]}",
        "data: {classes: [x]}",
        "data: {allow_missing: true}",
        "train: {seed: 1}",
        "train: {bootstrap: 1}",
        "train: {stage1_from: x}",
    ],
)
def test_what_makes_methods_comparable_is_no_methods_own(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(setting)
    with pytest.raises(ValueError, match="which all methods of a comparison share"):
        find_method(str(path))


def test_every_setting_but_those_of_the_second_stage_makes_another_first_stage() -> None:
    """Also a setting that there is not yet: what is not listed here counts."""
    of_stage2 = {"fusion", "int_hidden", "int_from", "int_at", "aux_backbone", "aux_weights", "share_adapters"}
    of_stage2 |= {"detach_fusion", "aux_weight", "gate_weight", "gate_prior", "stage1_from", "bootstrap"}
    of_stage2 |= {"temperature", "report_images"}
    base, free = BASE.to_dict(), set()
    for section in ("data", "model", "train"):
        for name in base[section]:
            values = {**base, section: base[section] | {name: "another"}}
            if stage1_key(SimpleNamespace(to_dict=lambda values=values: values)) == stage1_key(BASE):
                free.add(name)
    assert free == of_stage2


def test_a_first_stage_is_shared_only_where_it_is_the_same() -> None:
    same = [find_method(name).applied(BASE) for name in ("ei", "late")]
    same.append(replace(BASE, train=replace(BASE.train, aux_weight=0.9, gate_weight=0.0, bootstrap=5)))
    assert len({stage1_key(config) for config in same}) == 1
    others = [find_method(name).applied(BASE) for name in ("ei:lora", "ei:mor-no-bypass", "ei:full")]
    others.append(replace(BASE, train=replace(BASE.train, lr=0.5)))
    others.append(replace(BASE, train=replace(BASE.train, seed=1)))
    others.append(replace(BASE, data=replace(BASE.data, rotation=1)))
    assert len({stage1_key(config) for config in [BASE, *others]}) == 1 + len(others)
