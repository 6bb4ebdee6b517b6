"""Runs on tables in which samples lack modalities: not one of them, some, and all of a split."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ei import evaluate, predict, train
from ei.config import Config
from ei.data.manifest import ManifestError, Row, read_manifest
from ei.metrics.classification import summarise
from ei.runs.checkpoint import read_checkpoint
from ei.runs.setup import require_measurable, tell_rows

STAGES = ("stage1/cfp", "stage1/oct", "stage2")
# 9 of the 27 rows lack one of the two.
GAPS = {"oct": ["train1", "train4", "train8", "val1", "test0", "test4"], "cfp": ["train2", "train6", "test5"]}


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def emptied(manifest: Path, gaps: Mapping[str, Sequence[str]]) -> Path:
    """Empty the cells of these rows, in place."""
    rows = table(manifest)
    for row in rows:
        row.update({modality: "" for modality, ids in gaps.items() if row["id"] in ids})
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def learned(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / stage / "best.safetensors").parameters


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def allowing(config: Config, **data: object) -> Config:
    return replace(config, data=replace(config.data, **{"allow_missing": True, **data}))


@pytest.fixture(scope="module")
def gappy(tmp_path_factory: pytest.TempPathFactory, lasting_manifest: Path, study_config) -> Path:
    """A run that is only read; its manifest lies beside it in study/."""
    folder = tmp_path_factory.mktemp("gappy")
    shutil.copytree(lasting_manifest.parent, folder / "study")
    manifest = emptied(folder / "study/manifest.csv", GAPS)
    return train(allowing(study_config(manifest)), folder / "run")


def lacks(name: str, modality: str) -> bool:
    return name in GAPS[modality]


# None missing


@pytest.mark.fault("0 % of a modality missing, though some may be", "the same bits as where none may be")
def test_where_nothing_is_missing_nothing_changes(finished: Path, tmp_path: Path) -> None:
    run = train(allowing(Config.load(finished / "config.yaml")), tmp_path / "run")
    assert all(same(learned(run, stage), learned(finished, stage)) for stage in STAGES)
    assert (run / "predictions.csv").read_bytes() == (finished / "predictions.csv").read_bytes()
    found, expected = metrics_of(run), metrics_of(finished)
    for split, measured in found["splits"].items():
        subsets = measured.pop("subsets")
        assert list(subsets) == ["cfp", "oct", "cfp+oct"]
        assert subsets["cfp+oct"] == without_calibration(expected["splits"][split]["fused"])
        assert subsets["cfp"]["samples"] == subsets["oct"]["samples"] == measured["fused"]["samples"]
        assert subsets["cfp"]["curves"] != subsets["cfp+oct"]["curves"]
    assert found == expected


def without_calibration(summary: dict) -> dict:
    """Which is measured of what was predicted, and not of subsets."""
    return {name: value for name, value in summary.items() if name != "calibration"}


def test_runs_that_know_nothing_of_missing_modalities_report_no_subsets(finished: Path) -> None:
    assert all("subsets" not in measured for measured in metrics_of(finished)["splits"].values())
    assert 'id="subsets"' not in (finished / "report.html").read_text()


# Some missing


@pytest.mark.fault("30 % of the samples lack a modality", "each stage, and each figure, is of the rows that have it")
def test_the_first_stage_of_a_modality_is_that_of_the_rows_that_have_it(
    gappy: Path, tmp_path: Path, study_config
) -> None:
    """Bit for bit: from a table without the others, and without the column that they have."""
    shutil.copytree(gappy.parent / "study", tmp_path / "study")
    manifest = tmp_path / "study/manifest.csv"
    rows = [row for row in table(manifest) if row["oct"]]
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"cfp": row["oct"]} for row in rows)
    other = train(study_config(manifest), tmp_path / "run")
    assert same(learned(gappy, "stage1/oct"), learned(other, "stage1/oct"))
    history = [(run / "stage1/oct/metrics.jsonl").read_text().splitlines()[-1] for run in (gappy, other)]
    one, other_record = (json.loads(line) for line in history)
    assert (one["val"], one["loss"], one["step"]) == (other_record["val"], other_record["loss"], 2)


def test_cells_of_absent_modalities_are_empty_and_weigh_nothing(gappy: Path) -> None:
    rows = table(gappy / "predictions.csv")
    assert len(rows) == 15
    for row in rows:
        weights = {modality: float(row[f"weight:{modality}"]) for modality in ("cfp", "oct")}
        assert sum(weights.values()) == pytest.approx(1, abs=2e-6)
        assert sum(float(row[f"fused:{name}"]) for name in ("dark", "grey", "light")) == pytest.approx(1, abs=3e-6)
        for modality in ("cfp", "oct"):
            cells = [row[f"{modality}:{name}"] for name in ("dark", "grey", "light")]
            assert ("" in cells) == (cells == [""] * 3) == (weights[modality] == 0) == lacks(row["id"], modality)
        if lacks(row["id"], "oct"):
            assert [row[f"fused:{name}"] for name in ("dark", "grey")] == [row[f"cfp:{n}"] for n in ("dark", "grey")]


def test_each_figure_is_of_the_rows_that_have_it(gappy: Path) -> None:
    test = metrics_of(gappy)["splits"]["test"]
    assert test["fused"]["samples"] == 9
    assert {name: measured["samples"] for name, measured in test["modalities"].items()} == {"cfp": 8, "oct": 7}
    assert {name: measured["samples"] for name, measured in test["subsets"].items()} == {
        "cfp": 8,
        "oct": 7,
        "cfp+oct": 6,
    }
    rows = [row for row in table(gappy / "predictions.csv") if row["split"] == "test"]
    classes = ("dark", "grey", "light")
    for source, measured in (("oct", test["modalities"]["oct"]), ("fused", test["subsets"]["cfp+oct"])):
        kept = [row for row in rows if row["oct:dark"] and (source == "oct" or row["cfp:dark"])]
        logits = np.log([[float(row[f"{source}:{name}"]) for name in classes] for row in kept])
        labels = np.array([classes.index(row["label"]) for row in kept])
        again = summarise(logits, labels, [row["patient"] for row in kept], classes, multi_label=False, bootstrap=0)
        for name in ("accuracy", "mS2"):  # of decisions, which probabilities tell
            figures = [each["overall"][name]["value"] for each in (measured, again)]
            assert figures[0] == pytest.approx(figures[1]), (source, name)


def test_a_subset_is_what_the_model_says_of_rows_that_have_nothing_else(gappy: Path, tmp_path: Path) -> None:
    shutil.copytree(gappy.parent / "study", tmp_path / "study")
    rows = table(tmp_path / "study/manifest.csv")
    with_oct = [row["id"] for row in rows if row["split"] == "test" and row["oct"]]
    alone = emptied(tmp_path / "study/manifest.csv", {"cfp": with_oct})
    predict(gappy, alone, tmp_path / "out.csv")
    found = [row for row in table(tmp_path / "out.csv") if row["id"] in with_oct]
    labels = {row["id"]: row["label"] for row in rows}
    right = [
        max(("dark", "grey", "light"), key=lambda n, r=row: float(r[f"fused:{n}"])) == labels[row["id"]]
        for row in found
    ]
    measured = metrics_of(gappy)["splits"]["test"]["subsets"]["oct"]
    assert measured["overall"]["accuracy"]["value"] == pytest.approx(np.mean(right))


def test_the_report_has_a_table_of_subsets(gappy: Path) -> None:
    page = (gappy / "report.html").read_text()
    assert '<section id="subsets">' in page and ">cfp+oct</th><td>6</td>" in page
    assert "oct<small> (7 samples)</small>" in page


def test_evaluating_again_gives_the_same(gappy: Path) -> None:
    files = ("metrics.json", "predictions.csv", "gates.json")
    before = {name: (gappy / name).read_bytes() for name in files}
    evaluate(gappy)
    assert {name: (gappy / name).read_bytes() for name in files} == before


@pytest.mark.fault("a modality that is absent throughout a table to predict", "predicted from the others")
@pytest.mark.parametrize("modality", ["cfp", "oct"])
def test_predicting_without_a_modality(gappy: Path, tmp_path: Path, modality: str) -> None:
    shutil.copytree(gappy.parent / "study", tmp_path / "study")
    rows = table(tmp_path / "study/manifest.csv")
    there = [row for row in rows if row["cfp"] and row["oct"]]
    with (tmp_path / "study/new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "cfp", "oct"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | {modality: ""} for row in there)
    predict(gappy, tmp_path / "study/new.csv", tmp_path / "out.csv")
    for row in table(tmp_path / "out.csv"):
        assert row[f"{modality}:dark"] == "" and float(row[f"weight:{modality}"]) == 0


@pytest.mark.fault("an empty cell in a table to predict, and a run that saw none in training", "refused by row")
def test_a_run_that_never_saw_missing_ones_refuses_them(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "study", tmp_path / "study")
    manifest = emptied(tmp_path / "study/manifest.csv", {"oct": ["val1"]})
    with pytest.raises(
        ManifestError, match="row 15: oct is empty; .* only in a run that is trained with --allow-missing"
    ):
        predict(finished, manifest, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


# All missing


@pytest.mark.fault("100 % of a modality missing in evaluation", "reported from the others; no figure for it")
def test_a_modality_that_is_absent_from_all_of_evaluation(tmp_path: Path, manifest: Path, study_config) -> None:
    emptied(manifest, {"oct": [row["id"] for row in table(manifest) if row["split"] != "train"]})
    run = train(allowing(study_config(manifest)), tmp_path / "run")
    assert not json.loads((run / "stage1/oct/metrics.jsonl").read_text().splitlines()[-1])["val"]  # no rows to validate
    for measured in metrics_of(run)["splits"].values():
        assert list(measured["modalities"]) == ["cfp"]
        assert measured["subsets"]["oct"] is None and measured["subsets"]["cfp+oct"] is None
        assert measured["subsets"]["cfp"] == without_calibration(measured["fused"])
    assert {float(row["weight:cfp"]) for row in table(run / "predictions.csv")} == {1.0}
    assert set(json.loads((run / "gates.json").read_text())) == {"primary/cfp", "auxiliary/cfp"}


# Modality dropout


def test_modality_dropout_is_of_the_second_stage(finished: Path, tmp_path: Path) -> None:
    config = Config.load(finished / "config.yaml")
    dropping = replace(
        config,
        data=replace(config.data, modality_dropout=0.5),
        # Of the same data, so its first stage may be taken over.
        train=replace(config.train, stage1_from=str(finished)),
    )
    run = train(dropping, tmp_path / "run")
    again = train(dropping, tmp_path / "again")
    assert all(same(learned(run, stage), learned(finished, stage)) for stage in STAGES[:2])
    assert same(learned(run, "stage2"), learned(again, "stage2"))
    losses = [json.loads((r / "stage2/metrics.jsonl").read_text().splitlines()[1])["loss"] for r in (run, finished)]
    assert losses[0] != losses[1]
    assert list(metrics_of(run)["splits"]["test"]["subsets"]) == ["cfp", "oct", "cfp+oct"]
    shutil.copytree(finished.parent / "study", tmp_path / "study")
    predict(run, emptied(tmp_path / "study/manifest.csv", {"oct": ["val1"]}), tmp_path / "out.csv")
    assert [row["id"] for row in table(tmp_path / "out.csv") if not row["oct:dark"]] == ["val1"]


def test_a_run_with_gaps_takes_no_first_stage_of_other_rows(gappy: Path, finished: Path, tmp_path: Path) -> None:
    config = Config.load(gappy / "config.yaml")
    with pytest.raises(ValueError, match="its manifest, content of .*manifest.csv differ"):
        train(replace(config, train=replace(config.train, stage1_from=str(finished))), tmp_path / "run")


# What cannot be trained


@pytest.mark.parametrize(
    ("gaps", "message"),
    [
        ([0, 3, 6, 9], "^no train row with oct is of class dark; add such rows, or train with --stages 2$"),
        (range(12), "^no train row with oct is of class dark, grey, light; add"),
    ],
)
@pytest.mark.fault(
    "a class that a modality never shows in training", "refused before training, class and modality named"
)
def test_a_class_that_a_modality_never_shows(
    manifest: Path, tmp_path: Path, study_config, gaps: Sequence[int], message: str
) -> None:
    config = allowing(study_config(emptied(manifest, {"oct": [f"train{number}" for number in gaps]})))
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    require_measurable(read_manifest(manifest, config.data), alone=False)


def test_validation_rows_with_a_modality_must_differ(manifest: Path, study_config) -> None:
    config = allowing(study_config(emptied(manifest, {"oct": ["val1", "val2", "val4", "val5"]})))
    with pytest.raises(ValueError, match="^the val rows with oct are all alike, so no average precision"):
        require_measurable(read_manifest(manifest, config.data))


def test_how_many_lack_what_is_said(manifest: Path, study_config, capsys: pytest.CaptureFixture[str]) -> None:
    config = allowing(study_config(emptied(manifest, GAPS)))
    tell_rows(read_manifest(manifest, config.data))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "rows without cfp, train/val/test: 2/0/1",
        "rows without oct, train/val/test: 3/1/2",
    ]


def test_a_row_knows_what_it_has(tmp_path: Path) -> None:
    row = Row(2, "a", "a", "train", 0, {"cfp": (tmp_path,), "oct": ()})
    assert row.has_all(["cfp"]) and row.has_all([]) and not row.has_all(["cfp", "oct"])
