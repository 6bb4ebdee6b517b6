import re
from typing import get_args

import pytest
import yaml

from ei.config import (
    SHIPPED,
    BaselineConfig,
    Config,
    DataConfig,
    Fusion,
    IdleError,
    ModelConfig,
    TrainConfig,
    find_config,
)
from ei.data import derm7pt, mmc_amd, mrnet


def test_yaml_round_trip(tmp_path):
    config = Config(
        data=DataConfig(modalities=("a", "b"), classes=("x", "y"), mean=(0, 0.5, 1)),
        model=ModelConfig(ranks=(2, 4), alphas=(1.5, 3), adapter="mor"),
        train=TrainConfig(lr=5e-4, gate_prior="b", stages="2"),
    )
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == config


def test_defaults_are_the_papers():
    train, model = TrainConfig(), ModelConfig()
    assert (train.optimizer, train.momentum, train.weight_decay, train.batch_size) == ("sgd", 0.95, 1e-4, 8)
    assert (train.lr_low, train.lr, train.cycle_epochs, train.cycle_decay) == (1e-5, 1e-3, 4, 0.8)
    assert (train.epochs, train.patience, train.aux_weight, train.gate_weight) == (200, 10, 0.3, 0.1)
    assert (model.adapter, model.targets, model.int_hidden, model.detach_fusion) == ("mor", ("fc",), 384, True)


NAMES = [f"{data}-{backbone}" for data in ("derm7pt", "mmc-amd", "mrnet") for backbone in ("clip", "dinov2")]


@pytest.mark.parametrize(
    ("data", "modalities", "classes", "size"),
    [
        (mmc_amd, mmc_amd.MODALITIES, {"classes": mmc_amd.CLASSES, "images": "one"}, 448),
        (derm7pt, derm7pt.MODALITIES, {"classes": tuple(derm7pt.GROUPS)}, 512),
        (mrnet, mrnet.MODALITIES, {"labels": mrnet.LABELS}, 256),
    ],
)
def test_shipped_configurations_are_the_papers(data, modalities, classes, size):
    name = data.__name__.rpartition(".")[2].replace("_", "-")
    clip, dinov2 = (Config.load(find_config(f"{name}-{backbone}")) for backbone in ("clip", "dinov2"))
    # DINOv2 with registers; the default backbone is CLIP, and the default of slices, 4, is the paper's.
    expected = DataConfig(modalities=modalities, image_size=size, balance="oversample", **classes)
    assert clip == Config(data=expected)
    assert dinov2 == Config(data=expected, model=ModelConfig(backbone="vit_base_patch14_reg4_dinov2.lvd142m"))


def test_shipped_configurations_say_only_what_differs_from_the_defaults():
    assert [path.stem for path in sorted(SHIPPED.iterdir())] == NAMES
    defaults = Config().to_dict()
    for name in NAMES:
        for section, values in yaml.safe_load(find_config(name).read_text()).items():
            assert values and all(value != defaults[section][field] for field, value in values.items())


def test_a_file_comes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mrnet-clip").mkdir()
    assert find_config("mrnet-clip") == SHIPPED / "mrnet-clip.yaml"
    (tmp_path / "mrnet-clip").rmdir()
    (tmp_path / "mrnet-clip").write_text("train: {epochs: 3}")
    assert Config.load(find_config("mrnet-clip")).train.epochs == 3
    with pytest.raises(
        ValueError, match=f"configuration 'mmc': there is no such file, .* shipped are {', '.join(NAMES)}$"
    ):
        find_config("mmc")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": {"fusion": "late", "int_from": 3}},
            "with fusion 'late', int_from would change nothing; leave it out",
        ),
        ({"model": {"fusion": "late", "int_at": 1, "int_hidden": 8}}, "int_hidden and int_at would change nothing"),
        (
            {"model": {"fusion": "late", "aux_backbone": "tiny"}},
            "with fusion 'late', aux_backbone would change nothing",
        ),
        ({"model": {"fusion": "late", "share_adapters": True}}, "with fusion 'late', share_adapters would"),
        ({"model": {"fusion": "late"}, "train": {"aux_weight": 1}}, "with fusion 'late', aux_weight would"),
        ({"model": {"adapter": "frozen", "ranks": [4]}}, "with adapter 'frozen', ranks would change nothing"),
        ({"model": {"adapter": "full", "alphas": [4]}}, "with adapter 'full', alphas would change nothing"),
        (
            {"model": {"adapter": "full", "targets": ["qkv"], "dropout": 0.1}},
            "targets and dropout would change nothing",
        ),
        ({"model": {"adapter": "frozen", "share_adapters": True}}, "with adapter 'frozen', share_adapters would"),
        ({"model": {"aux_weights": "a.pth"}}, "with no aux_backbone, aux_weights would change nothing"),
        ({"model": {"aux_backbone": "tiny", "share_adapters": True}}, "share_adapters must be off with aux_backbone"),
        ({"model": {"fusion": "coscat", "int_at": 1}}, "with fusion 'coscat', int_at would change nothing"),
        ({"model": {"fusion": "joint", "detach_fusion": False}}, "with fusion 'joint', detach_fusion would"),
        ({"model": {"fusion": "cross"}, "train": {"gate_weight": 0}}, "with fusion 'cross', gate_weight would"),
        ({"model": {"fusion": "late-max"}, "train": {"gate_prior": "a"}}, "with fusion 'late-max', gate_prior would"),
        ({"model": {"fusion": "early"}, "train": {"stage1_from": "a"}}, "with fusion 'early', stage1_from would"),
        ({"baseline": {"mil_heads": 4}}, "with fusion 'ei', mil_heads would change nothing"),
        (
            {"model": {"fusion": "mm-mil"}, "baseline": {"mil_heads": 4, "cross_heads": 4, "dynmm_hard": True}},
            "with fusion 'mm-mil', dynmm_hard and cross_heads would|cross_heads and dynmm_hard would",
        ),
        (
            {"model": {"fusion": "mmrad"}, "baseline": {"mmrad_prompts": False, "mmrad_prompt_width": 8}},
            "with mmrad_prompts off, mmrad_prompt_width would change nothing",
        ),
        ({"train": {"optimizer": "adamw", "momentum": 0.9}}, "with optimizer 'adamw', momentum would change nothing"),
        ({"train": {"gate_weight": 0, "gate_prior": "oct"}}, "with gate_weight 0, gate_prior would change nothing"),
        ({"train": {"gate_weight": 0.2, "stages": "2"}}, "with stages '2' and no gate_prior, gate_weight would"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(tmp_path, settings, message):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=message):
        Config.load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"fusion": "late"}},
        {"model": {"fusion": "late-learned"}, "train": {"stage1_from": "a"}, "baseline": {"learned_hidden": 8}},
        {"model": {"fusion": "mm-mil"}, "baseline": {"mil_heads": 4, "mil_hidden": 512}},
        {"model": {"adapter": "lora", "bypass": False}},
        {"model": {"adapter": "full", "share_adapters": True}},
        {"train": {"gate_weight": 0, "stages": "2"}},
        {"train": {"gate_weight": 0.2, "stages": "2", "gate_prior": "oct"}},
        {"train": {"optimizer": "adamw"}},
    ],
)
def test_what_is_not_idle_is_allowed(settings):
    Config.from_dict(settings)


def test_of_a_run_what_would_change_nothing_is_left_out(tmp_path):
    """An earlier version may have let it pass, and its runs stay readable."""
    settings = {
        "model": {"fusion": "late", "int_hidden": 5, "ranks": [2]},
        "train": {"optimizer": "adamw", "momentum": 0.5},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    expected = Config(model=ModelConfig(fusion="late", ranks=(2,)), train=TrainConfig(optimizer="adamw"))
    assert Config.load(tmp_path / "c.yaml", of_run=True) == expected
    with pytest.raises(ValueError, match=r"c\.yaml: with .* would change nothing"):
        Config.load(tmp_path / "c.yaml")


def test_settings_that_are_kept_are_refused_all_the_same():
    settings = {"model": {"fusion": "late", "int_hidden": 5}, "train": {"aux_weight": 0.5}}
    with pytest.raises(IdleError, match="int_hidden would change nothing"):
        Config.without_idle(settings, kept={"int_hidden"})
    assert Config.without_idle(settings, kept={"epochs"}) == Config(model=ModelConfig(fusion="late"))


@pytest.mark.fault(
    "config.yaml of a run with a field that this version has not, or with another type", "file and field named"
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {balance: true}", "balance must be one of off, oversample, auto, weights, got True"),
        ("data: {resize: 3}", "unknown field of section 'data': resize; known are"),
        ("a: [\n  b: c: d", "while parsing a flow sequence"),
    ],
)
def test_a_run_of_another_version(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"cannot use the configuration {re.escape(str(path))}: .*{message}") as error:
        Config.load(path, of_run=True)
    assert "\n" not in str(error.value)


def test_every_setting_of_a_baseline_is_of_one_fusion():
    owners = {
        item: [name for name in get_args(Fusion) if item in BaselineConfig.of(name)] for item in vars(BaselineConfig())
    }
    assert all(len(names) == 1 for names in owners.values())


def test_runs_that_know_no_baselines_can_be_loaded(tmp_path):
    config = Config(train=TrainConfig(epochs=3))
    values = config.to_dict()
    del values["baseline"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert Config.load(tmp_path / "config.yaml") == config


def test_every_field_is_one_flag():
    names = [name for section in Config().to_dict().values() for name in section]
    assert len(names) == len(set(names))


def test_what_is_left_out_has_its_default(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\n  epochs: 3\nmodel:\n")
    assert Config.load(tmp_path / "c.yaml") == Config(train=TrainConfig(epochs=3))


def test_yaml_spellings_of_numbers_and_lists(tmp_path):
    text = "train: {lr: 1e-4, stages: 2}\ndata: {modalities: 'a, b', classes: [0, 1]}\n"
    text += "model: {ranks: '2,4', alphas: [1]}\n"
    (tmp_path / "c.yaml").write_text(text)
    config = Config.load(tmp_path / "c.yaml")
    assert (config.train.lr, config.train.stages) == (1e-4, "2")
    assert (config.data.modalities, config.data.classes) == (("a", "b"), ("0", "1"))
    assert (config.model.ranks, config.model.alphas) == ((2, 4), (1.0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {}", "unknown section: training; known are data, model, train, baseline"),
        ("train: {epoch: 3}", "unknown field of section 'train': epoch; known are optimizer,"),
        ("train: {epochs: many}", "epochs must be an integer, got 'many'"),
        ("train: {epochs: 2.5}", "epochs must be an integer, got 2.5"),
        ("train: {epochs: .inf}", "epochs must be an integer, got inf"),
        ("train: {epochs: true}", "epochs must be an integer, got True"),
        ("train: {lr: fast}", "lr must be a number, got 'fast'"),
        ("train: {lr: }", "lr must be a number, got None"),
        ("model: {bypass: 1}", "bypass must be true or false, got 1"),
        ("data: {classes: [no, yes]}", r"classes must be text \(quote yes, no, on, off\), got False"),
        ("data: {std: [a, b, c]}", "std must be a number, got 'a'"),
        ("model: {ranks: 4}", "ranks must be a list, got 4"),
        ("model: {adapter: dora}", "adapter must be one of mor, lora, .*, latelora, or peft:NAME, got 'dora'"),
        ("data: [a]", "section 'data' must hold"),
        ("- a", "must hold the sections"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Config.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63 - 1])
def test_large_seeds_come_back(tmp_path, seed):
    """No float holds them; a run whose own configuration cannot be read has been trained for nothing."""
    Config(train=TrainConfig(seed=seed)).save(tmp_path / "c.yaml")
    assert Config.load(tmp_path / "c.yaml").train.seed == seed


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.yaml"):
        Config.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (DataConfig, {"labels": "diagnosis"}, "labels must be a tuple of names, got 'diagnosis'"),
        (DataConfig, {"modalities": ("a", "a")}, "modalities must be without repetition"),
        (DataConfig, {"modalities": ("fused", "a")}, "modalities must be called other than"),
        (DataConfig, {"modalities": (".hidden",)}, "modalities must be called other than"),
        (DataConfig, {"std": (1, 1, 0)}, "std must be three positive numbers"),
        (DataConfig, {"slices": 0}, "slices must be at least 1"),
        (DataConfig, {"crop": 0.5}, "crop must be"),
        (DataConfig, {"modality_dropout": 1.0}, "modality_dropout must be at least 0 and less than 1, got 1.0"),
        (DataConfig, {"modalities": ("a", "b", "a+b"), "allow_missing": True}, r"told apart when joined by '\+', got"),
        (ModelConfig, {"fusion": "mid"}, "fusion must be one of ei, late, mm-mil, .*, got 'mid'"),
        (BaselineConfig, {"mil_heads": 0}, "mil_heads must be at least 1, got 0"),
        (BaselineConfig, {"sfusion_dropout": 1}, "sfusion_dropout must be at least 0 and below 1, got 1"),
        (BaselineConfig, {"dynmm_cost": -0.1}, "dynmm_cost must be at least 0, got -0.1"),
        (BaselineConfig, {"joint_temperature": 0}, "joint_temperature must be positive, got 0"),
        (BaselineConfig, {"early_hidden": (8, 0)}, r"early_hidden must be positive, got \(8, 0\)"),
        (ModelConfig, {"int_at": -1}, "int_at must be at least 0"),
        (TrainConfig, {"lr": 0}, "lr must be positive"),
        (TrainConfig, {"lr": 1e-6}, "lr_low must be positive and at most lr"),
        (TrainConfig, {"batch_size": 0}, "batch_size must be at least 1"),
        (TrainConfig, {"momentum": 1}, "momentum must be"),
        (TrainConfig, {"lr": 1e300}, r"lr must be between -1000000000 and 1000000000, got 1e\+300"),
        (TrainConfig, {"weight_decay": 1e300}, "weight_decay must be between"),
        (TrainConfig, {"bootstrap": 10**26}, "bootstrap must be at most 1000000000, got 1"),
        (TrainConfig, {"batch_size": 10**26}, "batch_size must be at most"),
        (TrainConfig, {"workers": 100_000}, "workers must be between 0 and 1024, got 100000"),
        (DataConfig, {"mean": (0.5, -1e300, 0.5)}, "mean must be between"),
        (DataConfig, {"balance": "weights", "class_weights": (1.0, 1e300)}, "class_weights must be between"),
        (ModelConfig, {"dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
        (ModelConfig, {"ranks": (2, 10**26)}, "ranks must be at most 1000000, got"),
        (ModelConfig, {"int_hidden": 10**12}, "int_hidden must be at most 1000000, got"),
        (BaselineConfig, {"early_hidden": (512, 10**10)}, "early_hidden must be at most 1000000, got"),
        (BaselineConfig, {"joint_weight": 1e300}, "joint_weight must be between"),
    ],
)
def test_values_that_make_no_sense(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_subsets_of_modalities():
    names = ["".join(subset) for subset in DataConfig(modalities=tuple("abc")).subsets]
    assert names == ["a", "b", "c", "ab", "ac", "bc", "abc"]
    assert len(DataConfig(modalities=tuple("abcdef")).subsets) == 63
    many = DataConfig(modalities=tuple("abcdefgh")).subsets
    assert [len(subset) for subset in many] == [1] * 8 + [7] * 8 + [8]


def test_models_know_missing_modalities_from_the_table_or_from_dropout():
    assert [
        DataConfig(**given).knows_missing for given in ({}, {"allow_missing": True}, {"modality_dropout": 0.1})
    ] == [
        False,
        True,
        True,
    ]


def test_saved_files_are_plain_yaml(tmp_path):
    Config().save(tmp_path / "c.yaml")
    assert list(yaml.safe_load((tmp_path / "c.yaml").read_text())) == ["data", "model", "train", "baseline"]


def test_large_numbers_that_can_be_meant() -> None:
    """Epochs without an end, a learning rate without a cycle."""
    TrainConfig(epochs=10**9, patience=10**9, cycle_epochs=1e9, save_minutes=1e300, seed=2**63 - 1)


def test_a_run_may_never_be_saved_within_an_epoch() -> None:
    assert TrainConfig(save_minutes=float("inf")).save_minutes == float("inf")
