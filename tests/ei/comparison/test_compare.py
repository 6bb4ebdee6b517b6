"""A comparison cell by cell: shared first stages, what goes on, what fails, folds, and the command line."""

import csv
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ei import train
from ei.cli import run
from ei.comparison import running
from ei.comparison.compare import compare
from ei.comparison.plan import Plan, make_plan
from ei.comparison.running import run_plan
from ei.comparison.table import tabulate
from ei.config import Config, ModelConfig
from ei.data.manifest import read_manifest
from ei.demo import demo_config, pretrain, write_pairs
from ei.evaluation.predictions import Predictions, stored_logits
from ei.interrupts import Interrupted
from ei.models import load_backbone
from ei.report.figures import Picture
from ei.runs.folder import RunFolder
from ei.runs.setup import locked, resolved
from ei.runs.stored_logits import StoredLogits

METHODS = ["ei", "late", "uni:cfp"]


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, write_study: Callable[..., Path], study_config: Callable[..., Config]
) -> Iterator[tuple[Config, Path, dict[str, Any]]]:
    """A comparison that is only read: its shared configuration, its folder, and its table."""
    folder = tmp_path_factory.mktemp("compared")
    config = study_config(write_study(folder / "study"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ei.report.figures._as_picture", lambda figure, alt: Picture("", alt))
        yield config, folder / "out", compare(config, METHODS, folder / "out", seeds=2)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Training that only draws the logits, better ones for EI; the folders that it was called for."""
    called: list[Path] = []

    def pretend(config: Config, run: Path) -> Path:
        manifest = read_manifest(config.data.manifest, config.data)
        config, folder = resolved(config, manifest), RunFolder(run)
        called.append(run)
        roles = (False, True) if config.model.aux_backbone else (False,)
        stages = [folder.stage1(name, role) for name in config.data.modalities for role in roles]
        for stage in [*stages, folder.stage2]:
            stage.path.mkdir(parents=True, exist_ok=True)
            stage.finished.write_text("{}")
            record = {"epoch": 1, "loss": None, "val": None, "seconds": 2.0, "images_per_second": 10, "memory_gib": 1}
            stage.history.write_text(json.dumps(record) + "\n")
        config.save(folder.config)
        rows = [row for row in manifest.rows if row.split != "train"]
        labels = np.array([row.label for row in rows])
        logits = np.random.default_rng(config.train.seed).normal(size=(len(rows), 3))
        logits += np.eye(3)[labels] * (3 if config.model.fusion == "ei" else 1)
        stored = stored_logits({"all": Predictions(logits.astype(np.float32), {}, None)}, {"all": rows}, manifest)
        folder.logits.write_bytes(stored.as_bytes())
        return run

    monkeypatch.setattr(running, "train", pretend)
    return called


def names(called: list[Path], out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in called]


def logits_of(run: Path) -> np.ndarray:
    return StoredLogits.read(run / "logits.npz").logits


def test_a_cell_is_what_training_alone_gives(compared: tuple, tmp_path: Path) -> None:
    """To the last bit, although its first stage was taken over and others were trained before it in this process."""
    config, out, _ = compared
    late = replace(config, model=replace(config.model, fusion="late"), train=replace(config.train, seed=1))
    alone = train(late, tmp_path / "late")
    np.testing.assert_array_equal(logits_of(alone), logits_of(out / "late/seed-1"))
    taken = Config.load(out / "late/seed-1/config.yaml").train.stage1_from
    assert Path(taken) == (out / "ei/seed-1").resolve()


def test_configurations_differ_in_the_method_and_the_seed_only(compared: tuple) -> None:
    _, out, _ = compared
    configs = {path: Config.load(out / path / "config.yaml") for path in ("ei/seed-0", "late/seed-0", "ei/seed-1")}
    base = configs["ei/seed-0"]
    for path, config in configs.items():
        late, seed = path.startswith("late"), int(path[-1])
        expected = replace(
            base,
            model=replace(base.model, fusion="late" if late else "ei"),
            train=replace(base.train, seed=seed, stage1_from=str((out / "ei/seed-0").resolve()) if late else ""),
        )
        assert config == expected


def test_one_modality_is_the_first_stage(compared: tuple) -> None:
    _, out, content = compared
    stored = StoredLogits.read(out / "uni+cfp/seed-0/logits.npz")
    assert stored.sources.tolist() == ["fused"] and set(stored.splits) == {"test"}
    entry = content["methods"][2]
    assert (entry["modality"], entry["parameters"]) == ("cfp", 41_187)
    assert entry["sources"].keys() == {"fused"}
    both = content["methods"][0]["cost"]["seconds"]
    assert 0 < entry["cost"]["seconds"] < both
    histories = [RunFolder(out / "ei/seed-0").stage1("cfp"), RunFolder(out / "ei/seed-1").stage1("cfp")]
    lines = [json.loads(line) for stage in histories for line in stage.history.read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines if line["images_per_second"])
    assert entry["cost"]["seconds"] == pytest.approx(seconds / 2)


def test_a_shared_first_stage_is_charged_to_both(compared: tuple) -> None:
    _, out, _ = compared
    ours, late = (json.loads((out / name / "seed-0/cell.json").read_text()) for name in ("ei", "late"))
    stage1 = [RunFolder(out / "ei/seed-0").stage1(name).history for name in ("cfp", "oct")]
    stage2 = RunFolder(out / "late/seed-0").stage2.history
    lines = [json.loads(line) for path in [*stage1, stage2] for line in path.read_text().splitlines()]
    assert late["seconds"] == pytest.approx(sum(line["seconds"] for line in lines if line["images_per_second"]))
    assert (ours["stage1_from"], late["stage1_from"]) == (None, "../../ei/seed-0")


def test_parameters_are_those_of_the_runs(compared: tuple) -> None:
    _, out, content = compared
    for method in content["methods"][:2]:
        cost = json.loads((out / method["name"] / "seed-0/cost.json").read_text())
        assert method["parameters"] == cost["trained"]["total"]


def test_all_that_is_done_stays(compared: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out, content = compared
    for name in ("train", "_evaluate_alone"):
        monkeypatch.setattr(running, name, lambda *_: pytest.fail("trained again"))
    before = (out / "comparison.csv").read_bytes()
    assert compare(config, METHODS, out, seeds=2) == content
    assert (out / "comparison.csv").read_bytes() == before


def test_only_what_is_new_is_trained(manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]) -> None:
    config, out = study_config(manifest), tmp_path / "out"
    compare(config, ["ei", "late"], out, seeds=1)
    compare(config, ["late", "ei", "ei:lora"], out, seeds=2)
    expected = ["ei/seed-0", "late/seed-0", "ei+lora/seed-0", "late/seed-1", "ei/seed-1", "ei+lora/seed-1"]
    assert names(pretended, out) == expected
    assert Config.load(out / "late/seed-1/config.yaml").train.stage1_from == ""
    assert Config.load(out / "ei/seed-1/config.yaml").train.stage1_from == str(out / "late/seed-1")
    assert Config.load(out / "ei+lora/seed-1/config.yaml").train.stage1_from == ""


def test_each_trains_its_own_first_stage_if_so_wished(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    plan = make_plan(study_config(manifest), ["ei", "late"], seeds=1, out=tmp_path / "out")
    run_plan(plan, share_stage1=False)
    assert [Config.load(path / "config.yaml").train.stage1_from for path in pretended] == ["", ""]


def test_a_refused_first_stage_is_trained_anew(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pretend = running.train

    def picky(config: Config, run: Path) -> Path:
        if config.train.stage1_from:
            raise ValueError("stage1_from cannot be used here")
        return pretend(config, run)

    monkeypatch.setattr(running, "train", picky)
    content = compare(study_config(manifest), ["ei", "late"], tmp_path / "out", seeds=1)
    assert not content["methods"][1]["failed"]
    assert "stage1_from cannot be used here. Its first stage is trained here" in capsys.readouterr().out


@pytest.mark.fault("a method of a comparison that fails while it trains", "said, in the table, the others go on")
@pytest.mark.parametrize("error", [ArithmeticError("loss is <nan> & gone"), RuntimeError("out of memory"), KeyError()])
def test_a_method_that_fails(
    error: Exception,
    manifest: Path,
    study_config: Any,
    tmp_path: Path,
    pretended: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    pretend = running.train

    def fails(config: Config, run: Path) -> Path:
        if config.model.fusion == "late" and config.train.seed == 1:
            raise error
        return pretend(config, run)

    monkeypatch.setattr(running, "train", fails)
    study_config(manifest).save(tmp_path / "config.yaml")
    out = tmp_path / "out"
    words = ["compare", "--config", str(tmp_path / "config.yaml"), "--methods", "late,ei", "--out", str(out)]
    assert run([*words, "--seeds", "2"]) == 1
    reason = str(error) or "KeyError"
    printed = capsys.readouterr().out
    assert f"failed: late, seed 1: {reason}" in printed
    content = json.loads((out / "comparison.json").read_text())
    assert [method["seeds"] for method in content["methods"]] == [[0], [0, 1]]
    with (out / "comparison.csv").open(newline="") as file:
        assert reason in next(csv.DictReader(file))["failed"]
    page = (out / "comparison.html").read_text()
    assert "(1 failed)" in page and "<nan>" not in page
    monkeypatch.setattr(running, "train", pretend)  # what was wrong is put right
    assert run([*words, "--seeds", "2"]) == 0
    assert names(pretended, out).count("late/seed-1") == 1 and len(pretended) == 4


@pytest.mark.fault("Ctrl-C in a cell of a comparison", "the same call goes on with that cell")
def test_a_comparison_that_was_stopped(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend = running.train

    def stopped(config: Config, run: Path) -> Path:
        if config.model.fusion == "late":
            # As training does it: the configuration is there, and not yet the end.
            run.mkdir(parents=True)
            resolved(config, read_manifest(config.data.manifest, config.data)).save(run / "config.yaml")
            raise Interrupted(signal.SIGINT)
        return pretend(config, run)

    monkeypatch.setattr(running, "train", stopped)
    config, out = study_config(manifest), tmp_path / "out"
    with pytest.raises(Interrupted):
        compare(config, ["ei", "late"], out, seeds=2)
    plan = make_plan(config, ["ei", "late"], seeds=2, out=out)
    assert [cell.state for cell in plan.cells] == ["done", "begun", "to do", "to do"]
    begun = Config.load(out / "late/seed-0/config.yaml")
    monkeypatch.setattr(running, "train", pretend)
    compare(config, ["ei", "late"], out, seeds=2)
    assert names(pretended, out) == ["ei/seed-0", "late/seed-0", "ei/seed-1", "late/seed-1"]
    assert Config.load(out / "late/seed-0/config.yaml") == begun  # with the first stage that it had begun with


def test_a_better_method_wins(manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]) -> None:
    content = compare(study_config(manifest), ["late", "ei"], tmp_path / "out", seeds=3)
    difference = content["methods"][1]["sources"]["fused"]["difference"]["mAP"]
    assert difference["value"] > 0.1 and difference["p"] < 0.1  # of five patients
    assert content["reference"] == "late" and content["split"] == "test"


def test_val_where_there_are_no_test_rows(
    write_study: Any, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    manifest = write_study(tmp_path / "study", {"train": 12, "val": 6})
    assert compare(study_config(manifest), ["ei"], tmp_path / "out", seeds=1)["split"] == "val"


@pytest.fixture
def folds(manifest: Path) -> list[Path]:
    """Three manifests that leave out test patients of their own."""
    lines = manifest.read_text().splitlines(keepends=True)
    paths = []
    for number in range(3):
        paths.append(manifest.with_name(f"fold{number}.csv"))
        chosen = [line for line in lines if not line.startswith("test") or int(line[4]) // 2 % 3 == number]
        paths[-1].write_text("".join(chosen))
    return paths


def test_folds(folds: list[Path], study_config: Any, tmp_path: Path, pretended: list[Path]) -> None:
    config, out = study_config(",".join(map(str, folds))), tmp_path / "out"
    config = replace(config, data=replace(config.data, classes=("dark", "grey", "light")))
    content = compare(config, ["ei", "late"], out, seeds=2)
    assert (content["samples"], content["patients"], content["folds"]) == (9, 5, ["fold0", "fold1", "fold2"])
    assert len(content["cells"]) == 12 and (out / "late/fold2/seed-1/logits.npz").is_file()
    assert {cell["fold"] for cell in content["cells"]} == set(content["folds"])
    assert Config.load(out / "late/fold2/seed-1/config.yaml").train.stage1_from == str(out / "ei/fold2/seed-1")
    assert "The rows of all folds are measured as one set" in (out / "comparison.html").read_text().replace("\n", " ")


@pytest.mark.fault("folds with a test patient in common, or other classes", "refused before training")
def test_folds_that_do_not_fit(folds: list[Path], study_config: Any, tmp_path: Path) -> None:
    lines = [path.read_text() for path in folds]
    shared = next(line for line in lines[0].splitlines() if line.startswith("test0"))
    config = study_config(",".join(map(str, folds)))
    folds[1].write_text(lines[1] + shared + "\n")
    with pytest.raises(ValueError, match="test rows must be of different patients, and both have 'test0'"):
        make_plan(config, ["ei"], seeds=1, out=tmp_path / "out")
    folds[1].write_text("".join(line for line in lines[1].splitlines(True) if ",dark," not in line))
    with pytest.raises(ValueError, match="must have the same classes, got dark, grey, light and grey, light"):
        make_plan(config, ["ei"], seeds=1, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "methods", "message"),
    [
        ({"manifest": "nowhere.csv"}, ["ei"], "the manifest 'nowhere.csv' does not exist"),
        ({"manifest": ","}, ["ei"], "the manifest ',' does not exist"),
        ({"manifest": ", nowhere.csv,"}, ["ei"], "the manifest 'nowhere.csv' does not exist"),
        ({"manifest": "nowhere.csv," * 30}, ["ei"], "the manifest 'nowhere.csv' does not exist"),  # no name of a file
        ({}, ["uni:cfp"], "'uni:cfp' is the first stage of another method, and none of the others has one"),
        ({}, ["uni:cfp", "late:lora"], "add such as late:mor"),
        ({}, ["ei", "nowhere"], "method 'nowhere': fusion must be"),
        ({"seeds": 0}, ["ei"], "seeds must be between 1 and 1000, got 0"),
        ({"seeds": 10**12}, ["ei"], "seeds must be between 1 and 1000, got 1000000000000"),
        ({"seeds": 2, "stage1_from": "runs/other"}, ["ei"], "stage1_from is one first stage, of one seed"),
        ({"int_at": 99}, ["late", "ei"], "method 'ei': tokens must enter before"),
    ],
)
def test_what_cannot_be_is_said_before_training(
    changes: dict, methods: list[str], message: str, manifest: Path, study_config: Any, tmp_path: Path
) -> None:
    config = study_config(changes.get("manifest", manifest))
    config = replace(config, model=replace(config.model, int_at=changes.get("int_at", 0)))
    config = replace(config, train=replace(config.train, stage1_from=changes.get("stage1_from", "")))
    with pytest.raises(ValueError, match=message):
        make_plan(config, methods, seeds=changes.get("seeds", 1), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_without_the_only_modality_are_said_before_training(
    manifest: Path, study_config: Any, tmp_path: Path
) -> None:
    config = study_config(manifest)
    config = replace(config, data=replace(config.data, allow_missing=True))
    lines = manifest.read_text().splitlines()
    column = lines[0].split(",").index("oct")
    at = next(number for number, line in enumerate(lines) if "test" in line.split(",")[1:3])
    cells_of_row = lines[at].split(",")
    cells_of_row[column] = ""
    manifest.write_text("\n".join([*lines[:at], ",".join(cells_of_row), *lines[at + 1 :]]) + "\n")
    with pytest.raises(ValueError, match=f"'uni:oct': 1 test row without .* such as '{cells_of_row[0]}'"):
        make_plan(config, ["late", "uni:oct"], seeds=1, out=tmp_path / "out")
    assert make_plan(config, ["late", "uni:cfp"], seeds=1, out=tmp_path / "out").cells


@pytest.mark.fault("weights of a comparison that are missing, damaged, or of another model", "refused before training")
@pytest.mark.parametrize("auxiliary", [False, True])
def test_weights_that_cannot_be_used(auxiliary: bool, manifest: Path, study_config: Any, tmp_path: Path) -> None:
    config = study_config(manifest)
    weights = tmp_path / "weights.safetensors"
    named = {"aux_backbone": "tiny", "aux_weights": str(weights)} if auxiliary else {"weights": str(weights)}
    config = replace(config, model=replace(config.model, **named))
    with pytest.raises(ValueError, match=r"^weights must be a file, but there is none at \S+$"):
        make_plan(config, ["late", "ei"], seeds=2, out=tmp_path / "out")
    weights.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"^cannot read weights from \S+: the file is damaged"):
        make_plan(config, ["late", "ei"], seeds=2, out=tmp_path / "out")
    save_file({"a": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match=r"^weights \S+ do not fit the backbone: missing: "):
        make_plan(config, ["late", "ei"], seeds=2, out=tmp_path / "out")
    save_file(load_backbone(ModelConfig(backbone="tiny"), 8).vit.state_dict(), weights)
    assert make_plan(config, ["late", "ei"], seeds=2, out=tmp_path / "out").cells


@pytest.mark.fault("a first stage that a comparison cannot take over", "refused before training")
def test_a_first_stage_that_cannot_be_taken_over(finished: Path, study_config: Any, tmp_path: Path) -> None:
    def planned(source: Path, methods: list[str], out: str = "out") -> Plan:
        config = study_config(finished.parent / "study/manifest.csv", stage1_from=str(source))
        return make_plan(config, methods, seeds=1, out=tmp_path / out)

    assert planned(finished, ["ei", "late", "mm-mil", "uni:cfp"]).cells
    with pytest.raises(ValueError, match="^method 'ei': .*nowhere is no run: there is no such folder$"):
        planned(tmp_path / "nowhere", ["mm-mil", "ei"])
    with pytest.raises(
        ValueError, match="^method 'late:lora': stage1_from .* cannot be used here, its adapter differ$"
    ):
        planned(finished, ["ei", "late:lora"])
    unfinished = shutil.copytree(finished, tmp_path / "unfinished")
    (unfinished / "stage1/oct/finished").unlink()
    with pytest.raises(ValueError, match="its stage 1 of 'oct' is not finished$"):
        planned(unfinished, ["ei"])


@pytest.mark.fault("a class of which a comparison has no train row", "refused before training")
def test_a_class_that_cannot_be_learned(manifest: Path, study_config: Any, tmp_path: Path) -> None:
    lines = manifest.read_text().splitlines(True)
    manifest.write_text("".join(line for line in lines if ",train,grey," not in line))
    with pytest.raises(ValueError, match="^no train row is of class grey; is a label misspelt"):
        make_plan(study_config(manifest), ["mm-mil"], seeds=1, out=tmp_path / "out")


def test_what_all_methods_fail_of_is_said_once(
    manifest: Path, study_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: Config, run: Path) -> Path:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(running, "train", fails)
    with pytest.raises(ValueError, match="^every method failed: out of memory$"):
        compare(study_config(manifest), ["late", "ei"], tmp_path / "out", seeds=2)


@pytest.mark.fault("a comparison whose settings or manifest have changed since", "refused before training, with names")
def test_a_comparison_of_other_settings(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    config, out = study_config(manifest), tmp_path / "out"
    compare(config, ["ei"], out, seeds=1)
    other = replace(config, train=replace(config.train, epochs=2))
    with pytest.raises(ValueError, match=r"begun with other settings: train epochs \(was 1, is 2\)"):
        compare(other, ["late", "ei"], out, seeds=1)
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ValueError, match="manifest.csv is not what it was when .*ei/seed-0 was trained"):
        compare(config, ["late", "ei"], out, seeds=1)
    assert len(pretended) == 1


def test_another_number_of_resamplings_only_makes_new_tables(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    config, out = study_config(manifest), tmp_path / "out"
    first = compare(config, ["ei", "late"], out, seeds=1)
    (out / "late/seed-0/cell.json").unlink()  # as if stopped there
    before = (out / "ei/seed-0/config.yaml").read_bytes(), (out / "late/seed-0/config.yaml").read_bytes()
    more = replace(config, train=replace(config.train, bootstrap=400))
    second = compare(more, ["ei", "late"], out, seeds=1)
    assert names(pretended, out) == ["ei/seed-0", "late/seed-0", "late/seed-0"]
    assert ((out / "ei/seed-0/config.yaml").read_bytes(), (out / "late/seed-0/config.yaml").read_bytes()) == before
    assert (first["bootstrap"], second["bootstrap"]) == (50, 400)
    old, new = (content["methods"][1]["sources"]["fused"]["measures"]["mAP"] for content in (first, second))
    assert old["value"] == new["value"] and (old["low"], old["high"]) != (new["low"], new["high"])
    assert "400 resamplings" in " ".join((out / "comparison.html").read_text().split())


@pytest.mark.fault("a comparison's folder that was moved", "first stages are found, and what they cost")
@pytest.mark.parametrize("several", [False, True])
def test_a_folder_that_was_moved(
    several: bool, manifest: Path, folds: list[Path], study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    config, out = study_config(",".join(map(str, folds)) if several else manifest), tmp_path / "out"
    content = compare(config, ["ei", "late"], out, seeds=1)
    begun = out / "late" / ("fold1" if several else "") / "seed-0"
    for stage in begun.glob("stage1/*"):
        (stage / "metrics.jsonl").unlink()  # as where it is taken over and not trained
    (begun / "cell.json").unlink()
    moved = out.rename(tmp_path / "moved")
    compare(config, ["ei", "late"], moved, seeds=1)
    begun = moved / begun.relative_to(out)
    assert pretended[-1] == begun and len(pretended) == (7 if several else 3)
    assert Config.load(begun / "config.yaml").train.stage1_from == str(moved / "ei" / begun.relative_to(moved / "late"))
    notes = [json.loads(path.read_text()) for path in sorted((moved / "late").rglob("cell.json"))]
    assert all(note["stage1_from"].startswith("../") and note["seconds"] == 6 for note in notes)
    assert content["methods"][1]["cost"]["seconds"] == sum(note["seconds"] for note in notes)


@pytest.mark.fault("a comparison that has moved, and another in its place", "its costs are its own")
def test_another_comparison_where_a_moved_one_was(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    config, out, moved = study_config(manifest), tmp_path / "out", tmp_path / "moved"
    compare(config, ["ei", "late"], out, seeds=1)
    for stage in (out / "late/seed-0").glob("stage1/*"):
        (stage / "metrics.jsonl").unlink()  # as where it is taken over and not trained
    shutil.copytree(out, moved)
    (moved / "late/seed-0/cell.json").unlink()
    for path in out.glob("ei/seed-0/stage1/*/metrics.jsonl"):
        path.write_text(path.read_text().replace('"seconds": 2.0', '"seconds": 100.0'))
    compare(config, ["ei", "late"], moved, seeds=1)
    source = Config.load(moved / "late/seed-0/config.yaml").train.stage1_from
    assert source == str(moved / "ei/seed-0")
    assert json.loads((moved / "late/seed-0/cell.json").read_text())["seconds"] == 6


def test_a_joint_embedding_without_negatives_is_refused_before_others_are_trained(
    manifest: Path, study_config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="with fusion 'joint', two or more samples"):
        make_plan(study_config(manifest, batch_size=1), ["late", "joint"], seeds=1, out=tmp_path / "out")


def test_a_first_stage_from_elsewhere_is_not_mistaken_for_one_of_this_folder(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    """Its path ends as one of this comparison's does."""
    config = study_config(manifest)
    compare(config, ["ei"], tmp_path / "elsewhere", seeds=1)
    source = str(tmp_path / "elsewhere" / "ei" / "seed-0")
    (cell,) = make_plan(config, ["ei"], seeds=1, out=tmp_path / "out").cells
    cell.folder.mkdir(parents=True)
    cell.taking_stage1(source).save(cell.folder / "config.yaml")
    cell.follow_moved_folder()
    assert cell.begun.train.stage1_from == source


def test_one_modality_of_several_adapters(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(run: Path, modality: str) -> tuple[torch.nn.Module, Config]:
        loaded.append(f"{run.relative_to(tmp_path / 'out')} {modality}")
        return torch.nn.Identity(), Config.load(run / "config.yaml")

    monkeypatch.setattr(running, "load", load)
    logits = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    monkeypatch.setattr(running, "predict_rows", lambda *_, **__: Predictions(logits, {}, None))
    methods = ["ei", "ei:lora", "uni:cfp", "uni:cfp:lora", "uni:oct:lora"]
    content = compare(study_config(manifest), methods, tmp_path / "out", seeds=1)
    assert loaded == ["ei/seed-0 cfp", "ei+lora/seed-0 cfp", "ei+lora/seed-0 oct"]
    assert [method["name"] for method in content["methods"] if not method["failed"]] == methods
    parameters = [method["parameters"] for method in content["methods"][2:]]
    assert parameters[0] > parameters[1] == parameters[2]
    with pytest.raises(ValueError, match="with adapter 'full'; add such as late:full$"):
        make_plan(study_config(manifest), ["ei", "uni:cfp:full"], seeds=1, out=tmp_path / "other")


def test_one_modality_of_other_settings_is_refused(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no configuration of its own, so with another method as the first it was taken for one of this protocol."""
    monkeypatch.setattr(running, "load", lambda run, _: (torch.nn.Identity(), Config.load(run / "config.yaml")))
    logits = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    monkeypatch.setattr(running, "predict_rows", lambda *_, **__: Predictions(logits, {}, None))
    config, out = study_config(manifest), tmp_path / "out"
    compare(config, ["late", "uni:cfp"], out, seeds=1)
    other = replace(config, train=replace(config.train, epochs=config.train.epochs + 1))
    with pytest.raises(ValueError, match=r"predicted by .*late/seed-0, which was begun .*: train epochs \(was"):
        make_plan(other, ["ei", "uni:cfp"], seeds=1, out=out)
    quicker = replace(config, train=replace(config.train, workers=1, bootstrap=7))
    assert [cell.state for cell in make_plan(quicker, ["ei", "uni:cfp"], seeds=1, out=out).cells] == ["to do", "done"]


@pytest.mark.fault("two comparisons in one folder", "the second is refused")
def test_two_comparisons_in_one_folder(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    with locked(RunFolder(tmp_path / "out")), pytest.raises(ValueError, match="another process is training in .*out"):
        compare(study_config(manifest), ["ei"], tmp_path / "out", seeds=1)
    assert not pretended
    compare(study_config(manifest), ["ei"], tmp_path / "out", seeds=1)


def test_several_processes_are_refused(
    manifest: Path, study_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        make_plan(study_config(manifest), ["ei"], seeds=1, out=tmp_path)


def test_the_plan_writes_nothing(manifest: Path, tmp_path: Path, pretended: list[Path], capsys) -> None:
    words = ["compare", "--manifest", str(manifest), "--modalities", "cfp,oct", "--backbone", "tiny"]
    words += ["--image-size", "8", "--device", "cpu", "--int-hidden", "5", "--methods", "ei,late,ei:lora,uni:oct"]
    out = tmp_path / "out"
    assert run([*words, "--seeds", "1", "--out", str(out), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ei ") and lines[0].endswith("as given")
    assert "fusion=late, int_hidden=384" in lines[1]
    assert "adapter=lora" in lines[2] and "the first stage of oct alone" in lines[3]
    assert lines[4] == f"to do  ei, seed 0  {out / 'ei/seed-0'}"
    assert not out.exists() and not pretended
    assert run(["compare", "--methods", "ei"]) == 1
    assert "compare needs --manifest FILE" in capsys.readouterr().err


def test_a_baseline_without_a_first_stage_goes_on(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    """What a cell's configuration resolves to depends on its method: such a run is saved with stages '2'."""
    config, out = study_config(manifest), tmp_path / "out"
    content = compare(config, ["ei", "mm-mil"], out, seeds=1)
    cells_of = {cell.method.name: cell for cell in make_plan(config, ["ei", "mm-mil"], seeds=1, out=out).cells}
    assert {name: cell.config.train.stages for name, cell in cells_of.items()} == {"ei": "both", "mm-mil": "2"}
    for cell in cells_of.values():
        assert cell.state == "done" and Config.load(cell.folder / "config.yaml") == cell.config
    (out / "mm-mil/seed-0/cell.json").unlink()  # as if killed between the end of training and this note
    assert compare(config, ["ei", "mm-mil"], out, seeds=1) == content
    assert names(pretended, out) == ["ei/seed-0", "mm-mil/seed-0", "mm-mil/seed-0"]


def test_one_modality_whatever_the_shared_fusion_is(manifest: Path, study_config: Any, tmp_path: Path) -> None:
    base = study_config(manifest)
    base = replace(base, model=replace(base.model, fusion="mm-mil"))
    plan = make_plan(base, ["late", "uni:cfp"], seeds=1, out=tmp_path / "out")
    assert [cell.config.train.stages for cell in plan.cells] == ["both", "both"]


@pytest.mark.fault("cell.json of a comparison empty, cut, or of something else", "named, before training")
@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "[[1, 2]]", "5", "null", '{"manifest": "x"}'])
def test_a_damaged_note(text: str, manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]) -> None:
    config, out = study_config(manifest), tmp_path / "out"
    content = compare(config, ["ei"], out, seeds=1)
    (out / "ei/seed-0/cell.json").write_text(text)
    with pytest.raises(ValueError, match="cannot read .*cell.json: .*; delete it, and it is written again"):
        compare(config, ["ei"], out, seeds=2)
    (out / "ei/seed-0/cell.json").unlink()
    assert compare(config, ["ei"], out, seeds=1) == content


@pytest.mark.fault("logits.npz of a finished cell deleted or damaged", "named, and written again once it is deleted")
def test_lost_logits(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = study_config(manifest), tmp_path / "out"
    content = compare(config, ["ei"], out, seeds=2)
    path = out / "ei/seed-0/logits.npz"
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    failed = compare(config, ["ei"], out, seeds=2)["methods"][0]["failed"]
    assert len(failed) == 1 and "logits.npz" in failed[0]["reason"]
    assert failed[0]["reason"].endswith("; delete it, and the same command writes it again")
    path.unlink()
    monkeypatch.setattr(running, "train", lambda config, run: run)  # it is finished, and left alone
    monkeypatch.setattr(running, "evaluate", lambda run: RunFolder(run).logits.write_bytes(good))
    assert compare(config, ["ei"], out, seeds=2) == content


@pytest.mark.fault("an image that has changed since a cell of a comparison was trained", "refused before training")
def test_images_that_have_changed_since(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    config, out = study_config(manifest), tmp_path / "out"
    compare(config, ["ei"], out, seeds=1)
    spoil(manifest)
    with pytest.raises(ValueError, match="an image of .*manifest.csv is not what it was when .*ei/seed-0 was trained"):
        compare(config, ["ei", "ei:lora"], out, seeds=1)
    assert len(pretended) == 1


@pytest.mark.fault("an image that changes while a comparison runs", "cells after it fail, and say so")
def test_images_that_change_meanwhile(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend = running.train

    def spoils(config: Config, run: Path) -> Path:
        pretend(config, run)
        spoil(manifest)
        return run

    monkeypatch.setattr(running, "train", spoils)
    content = compare(study_config(manifest), ["ei", "ei:lora"], tmp_path / "out", seeds=1)
    assert not content["methods"][0]["failed"]
    assert "an image of " in (reason := content["methods"][1]["failed"][0]["reason"])
    assert "has changed while the comparison ran" in reason


def spoil(manifest: Path) -> None:
    """One image becomes another."""
    image = manifest.with_name("train0_cfp.png")
    image.write_bytes(manifest.with_name("train1_cfp.png").read_bytes())


def test_only_a_method_with_auxiliary_vits_is_charged_for_them(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    """Although the first stage that late fusion takes over lies beside theirs."""
    config = study_config(manifest)
    config = replace(config, model=replace(config.model, aux_backbone="tiny"))
    content = compare(config, ["ei", "late"], tmp_path / "out", seeds=1)
    assert Config.load(tmp_path / "out/late/seed-0/config.yaml").train.stage1_from
    assert [method["cost"]["seconds"] for method in content["methods"]] == [10, 6]  # 2 s each
    assert content["methods"][0]["cost"]["memory_gib"] is None  # on a CPU it is that of the process


def test_a_first_stage_is_taken_from_where_it_was_trained(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path]
) -> None:
    """Not from a run that has taken it over itself, whatever the order: what it cost is written down where it was."""
    config, out = study_config(manifest), tmp_path / "out"
    compare(config, ["ei", "late"], out, seeds=1)
    compare(config, ["late", "late:average", "ei"], out, seeds=1)
    assert Config.load(out / "late+average/seed-0/config.yaml").train.stage1_from == str(out / "ei/seed-0")


def test_one_modality_comes_after_those_that_train_it(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(running, "_evaluate_alone", lambda cell, _: done.append((cell.title, len(pretended))))
    plan = make_plan(study_config(manifest), ["uni:cfp", "ei"], seeds=2, out=tmp_path / "out")
    assert not run_plan(plan)
    assert done == [("uni:cfp, seed 0", 2), ("uni:cfp, seed 1", 2)]


def test_without_a_first_stage_there_is_none_of_one_modality(manifest: Path, study_config: Any, tmp_path: Path) -> None:
    config = study_config(manifest, stages="2")
    with pytest.raises(ValueError, match="none of the others has one"):
        make_plan(config, ["ei", "uni:cfp"], seeds=1, out=tmp_path / "out")


def test_patients_are_resampled_by_the_settings(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def noted(*args: Any, **settings: Any) -> dict[str, Any]:
        given.update(settings)
        return tabulate(*args, **settings)

    monkeypatch.setattr("ei.comparison.compare.tabulate", noted)
    compare(study_config(manifest, seed=3, bootstrap=20), ["ei"], tmp_path / "out", seeds=1)
    assert given == {"folds": [""], "bootstrap": 20, "seed": 3}


def test_folds_of_one_name(folds: list[Path], study_config: Any, tmp_path: Path) -> None:
    """Their folders would be one."""
    with pytest.raises(ValueError, match="must have different names"):
        make_plan(study_config(f"{folds[0]},{folds[0]}"), ["ei"], seeds=1, out=tmp_path / "out")


def test_folds_of_which_some_have_no_test_rows(folds: list[Path], study_config: Any, tmp_path: Path) -> None:
    """They would be compared on val rows, which nobody has asked for."""
    folds[1].write_text("".join(line for line in folds[1].read_text().splitlines(True) if not line.startswith("test")))
    config = study_config(",".join(map(str, folds)))
    with pytest.raises(ValueError, match="folds are compared on test rows, and there are none in .*fold1.csv$"):
        make_plan(config, ["ei"], seeds=1, out=tmp_path / "out")


@pytest.mark.parametrize("file", ["config.yaml", "thesis/chapter.txt", "ei/notes.txt"])
def test_a_folder_of_something_else(file: str, manifest: Path, study_config: Any, tmp_path: Path) -> None:
    mine = tmp_path / "out" / file
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match="out is neither a comparison nor an empty folder; choose another with --out$"):
        compare(study_config(manifest), ["ei"], tmp_path / "out", seeds=1)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]


@pytest.mark.parametrize("left", [".lock", "ei", "ei/seed-0", "ei/fold1/seed-0"])
def test_what_a_comparison_leaves_that_was_killed_early(
    left: str, manifest: Path, study_config: Any, tmp_path: Path
) -> None:
    (tmp_path / "out" / left).mkdir(parents=True)
    assert make_plan(study_config(manifest), ["ei"], seeds=1, out=tmp_path / "out").cells[0].state == "to do"


def test_a_method_may_lie_in_the_folder(manifest: Path, study_config: Any, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("model: {int_hidden: 8}")
    (cell,) = make_plan(study_config(manifest), [str(mine)], seeds=1, out=tmp_path / "out").cells
    assert cell.config.model.int_hidden == 8


@pytest.mark.parametrize("method", ["ei", "uni:cfp"])
def test_a_cell_whose_folder_is_a_file(method: str, manifest: Path, study_config: Any, tmp_path: Path) -> None:
    path = tmp_path / "out" / method.replace(":", "+") / "seed-0"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match="seed-0 exists and is not a folder"):
        make_plan(study_config(manifest), ["late", method], seeds=1, out=tmp_path / "out")
    assert path.read_text() == "mine"


def test_one_modality_with_logits_that_are_not_finite(
    manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be taken for rows without an image, and the method measured on the others."""
    config, out = study_config(manifest), tmp_path / "out"
    monkeypatch.setattr(running, "load", lambda run, modality: (torch.nn.Identity(), Config.load(run / "config.yaml")))
    logits = np.zeros((9, 3), np.float32)
    logits[2] = np.nan
    monkeypatch.setattr(running, "predict_rows", lambda *_, **__: Predictions(logits, {}, None))
    content = compare(config, ["ei", "uni:cfp"], out, seeds=1)
    assert "gives logits that are not finite" in content["methods"][1]["failed"][0]["reason"]
    assert not (out / "uni+cfp").exists()


@pytest.mark.fault(
    "a module that is missing, or no memory, in a cell of a comparison", "in the table, the others go on"
)
@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'peft'"),
        MemoryError(),
        OSError(28, "No space"),
        ValueError("an image is gone"),
    ],
)
def test_what_else_fails_in_a_cell(
    error: Exception, manifest: Path, study_config: Any, tmp_path: Path, pretended: list[Path], monkeypatch: Any
) -> None:
    pretend, tried = running.train, []

    def fails(config: Config, run: Path) -> Path:
        if config.model.fusion == "ei":
            tried.append(run)
            raise error
        return pretend(config, run)

    monkeypatch.setattr(running, "train", fails)
    content = compare(study_config(manifest), ["ei", "late"], tmp_path / "out", seeds=1)
    assert [len(method["failed"]) for method in content["methods"]] == [1, 0]
    assert content["methods"][0]["failed"][0]["reason"] == (str(error) or "MemoryError")
    assert not (tmp_path / "out/ei/seed-0/cell.json").exists() and len(tried) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_told_branches_beat_blind_ones(tmp_path: Path) -> None:
    """On pairs of digits a branch sees half of the class: only intervention tells it the other half."""
    manifest = write_pairs(tmp_path / "data", seed=0)
    weights, _ = pretrain(tmp_path / "backbone.safetensors", seed=0)
    content = compare(demo_config(manifest, weights, seed=0), ["late", "ei"], tmp_path / "out", seeds=1)
    late, told = (method["sources"] for method in content["methods"])
    for side in ("left", "right"):
        assert late[side]["measures"]["accuracy"]["value"] < 0.6
        assert told[side]["measures"]["accuracy"]["value"] > 0.8
        difference = told[side]["difference"]["accuracy"]
        assert difference["low"] > 0.2 and difference["p"] < 0.01
    assert abs(told["fused"]["difference"]["accuracy"]["value"]) < 0.1  # both have both halves there
