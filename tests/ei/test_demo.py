import csv
import json

import numpy as np
import pytest
from PIL import Image

from ei.cli import run
from ei.config import DataConfig
from ei.data.manifest import read_manifest
from ei.demo import CLASSES, MODALITIES, comparison, run_demo, split_digits, write_pairs
from ei.runs.setup import tell_warnings


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("demo"), seed=0)


def rows(manifest) -> list[dict]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_class_is_both_parities(pairs):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for row in rows(pairs)[:200]:
        left, right = (digits.target[int(row[side][7:11])] % 2 for side in MODALITIES)
        assert row["label"] == f"{('even', 'odd')[left]}-{('even', 'odd')[right]}"


def test_images_are_the_digits(pairs):
    from sklearn.datasets import load_digits

    image = np.asarray(Image.open(pairs.parent / "digits/0007.png"))
    np.testing.assert_allclose(image * (16 / 255), load_digits().images[7], atol=0.04)


def test_no_digit_and_no_patient_is_on_both_sides(pairs):
    sides = {"train": set(), "test": set()}
    patients = {"train": set(), "test": set()}
    for row in rows(pairs):
        sides[row["split"]] |= {row["left"], row["right"]}
        patients[row["split"]].add(row["patient"])
    assert not sides["train"] & sides["test"] and not patients["train"] & patients["test"]
    trained_on = {f"digits/{index:04d}.png" for index in split_digits(1797)[0]}
    assert not sides["test"] & trained_on  # what the backbone was pre-trained on
    assert len(patients["test"]) < 600  # patients have several pairs


def test_the_manifest_is_a_good_one(pairs):
    manifest = read_manifest(pairs, DataConfig(modalities=MODALITIES, classes=CLASSES))
    assert (len(manifest.split("train")), len(manifest.split("test"))) == (2000, 600)
    counts = np.bincount([row.label for row in manifest.rows])
    assert counts.min() > 0.2 * counts.sum()


def test_the_seed_decides_the_pairs(pairs, tmp_path):
    assert write_pairs(tmp_path / "same", seed=0).read_text() == pairs.read_text()
    assert write_pairs(tmp_path / "other", seed=1).read_text() != pairs.read_text()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run(["demo", "--out", str(tmp_path)]) == 1
    assert "was not made by the demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_table():
    figures = {"accuracy": 0.5, "mAP": 0.25}
    branches = {"fused": figures, "left": figures, "right": {"accuracy": 0.125, "mAP": 1.0}}
    lines = comparison({"without INT": branches, "with INT": {**branches, "right": {"accuracy": 0.75, "mAP": 0.5}}})
    assert lines[4].split() == ["right", "branch", "alone", "0.125", "0.750", "1.000", "0.500"]


def test_the_note_about_its_images_is_explained(pairs, capsys, monkeypatch, tmp_path):
    def train(config, run):
        tell_warnings(read_manifest(config.data.manifest, config.data), "the pairs")
        raise KeyboardInterrupt

    monkeypatch.setattr("ei.demo.train", train)
    monkeypatch.setattr("ei.demo.pretrain", lambda path, seed: (path, 0.9))
    assert run(["demo", "--out", str(tmp_path)]) == 130
    explained, _, note, first = capsys.readouterr().out.splitlines()[-4:]
    assert "the same image is that of several patients: here, that note is no fault" in explained
    assert note == "note: 51 warnings about the pairs; 'ei check' shows all"
    assert first == "  file: 1398 images are the same for several patients of one split; 50 of them are told"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_intervention_shows_in_the_branches(tmp_path):
    """A branch alone can know one parity of two; told of the other digit, it answers for both."""
    results = run_demo(tmp_path / "demo")
    for branch in MODALITIES:
        assert results["without INT"][branch]["accuracy"] <= 0.55
        assert results["with INT"][branch]["accuracy"] >= 0.75
    for name in ("without INT", "with INT"):
        assert results[name]["fused"]["accuracy"] >= 0.75
    assert (tmp_path / "demo/ei/report.html").exists()
    seconds = json.loads((tmp_path / "demo/demo.json").read_text())["seconds"]
    assert seconds < 600, "the promise is three minutes on two quiet cores"
