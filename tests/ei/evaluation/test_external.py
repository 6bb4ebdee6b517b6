"""A finished run evaluated on another table: the figures are right, and no row is one that the run has seen."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ei import evaluate, predict
from ei.cli import run as command_line
from ei.config import Config
from ei.data.manifest import ManifestError

CLASSES = ("dark", "grey", "light")


def write_external(folder: Path, *extra: str, header: str = "id,patient,label,cfp,oct") -> Path:
    """Ten rows of five new patients, brightness by class; and further lines."""
    generator = np.random.default_rng(9)
    lines = [header]
    for number in range(10):
        for name in ("c", "o"):
            pixels = generator.integers(0, 60, (8, 8)) + 90 * (number % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"new{number}{name}.png")
        lines.append(f"new{number},other{number // 2},{CLASSES[number % 3]},new{number}c.png,new{number}o.png")
    (folder / "external.csv").write_text("\n".join([*lines, *extra]))
    return folder / "external.csv"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports take two seconds each."""
    monkeypatch.setattr("ei.evaluation.evaluate.write_report", lambda folder: None)


def test_figures_files_and_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = write_external(run.parent / "study"), tmp_path / "deep/external"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command_line(["evaluate", str(run), "--manifest", str(table), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "external: 10 samples, patients: 5, 95 % intervals by patient" in said and f"report: {out}" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, "the run was changed"
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["splits"]) == ["external"]
    ours = rows_of(out / "predictions.csv")
    assert [row["label"] for row in ours] == [CLASSES[number % 3] for number in range(10)]
    assert {row["split"] for row in ours} == {"external"}
    predict(run, table, tmp_path / "predicted.csv")
    probabilities = [name for name in ours[0] if ":" in name]
    theirs = rows_of(tmp_path / "predicted.csv")
    assert [[row[name] for name in probabilities] for row in ours] == [
        [row[name] for name in probabilities] for row in theirs
    ]
    right = [max(CLASSES, key=lambda name, r=row: float(r[f"fused:{name}"])) == row["label"] for row in ours]
    assert metrics["splits"]["external"]["fused"]["overall"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    page = (out / "report.html").read_text()
    assert "external" in page and str(table.name) in page
    again = (out / "metrics.json").read_bytes()
    evaluate(run, table, out)
    assert (out / "metrics.json").read_bytes() == again


@pytest.mark.usefixtures("undrawn")
def test_a_split_column_is_not_looked_at(run: Path, tmp_path: Path) -> None:
    table = write_external(run.parent / "study")
    lines = table.read_text().splitlines()
    splits = ["split", *["train", "val", "anything", "", "test"] * 2]
    table.write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits, strict=True)))
    assert evaluate(run, table, tmp_path / "out")["splits"]["external"]["fused"]["samples"] == 10


@pytest.mark.usefixtures("undrawn")
def test_temperatures_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    config = Config.load(run / "config.yaml")
    replace(config, train=replace(config.train, temperature=True)).save(run / "config.yaml")
    table = write_external(run.parent / "study")
    with pytest.raises(ValueError, match="has no temperature yet"):
        evaluate(run, table, tmp_path / "out")
    own = evaluate(run)["temperatures"]
    assert evaluate(run, table, tmp_path / "out")["temperatures"] == own
    assert not (tmp_path / "out/temperature.json").exists()


@pytest.mark.fault("an external table with {case} that the run has seen", "refused, with the rows")
@pytest.mark.parametrize("case", ["a patient of train", "a patient of val", "an image of train", "an image of val"])
def test_rows_that_the_run_has_seen_are_refused(run: Path, tmp_path: Path, case: str) -> None:
    study, split = run.parent / "study", case.split()[-1]
    if "patient" in case:
        line, message = (
            f"x,{split}0,dark,new0c.png,new1o.png",
            "rows 12 are of patients that .*run was trained or chosen on",
        )
    else:
        (study / "copy.png").write_bytes((study / f"{split}3_oct.png").read_bytes())
        line, message = "x,nobody,dark,new0c.png,copy.png", "rows 12 have images that .*run was trained or chosen on"
    with pytest.raises(ValueError, match=message):
        evaluate(run, write_external(study, line), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_test_rows_of_the_run_were_not_seen(run: Path, tmp_path: Path) -> None:
    table = write_external(run.parent / "study", "x,test0,dark,test0_cfp.png,test0_oct.png")
    assert evaluate(run, table, tmp_path / "out")["splits"]["external"]["fused"]["samples"] == 11


def _lose(study: Path) -> None:
    (study / "manifest.csv").unlink()


def _change(study: Path) -> None:
    (study / "manifest.csv").write_text((study / "manifest.csv").read_text() + "\n")


@pytest.mark.fault(
    "an external table, and the run's own is gone or changed", "said: what the run has seen is not known"
)
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("spoil", "told"), [(_lose, "is gone or has faults, so"), (_change, "is not what it was, so")])
def test_what_the_run_has_seen_may_not_be_known(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], told: str
) -> None:
    table = write_external(run.parent / "study")
    spoil(run.parent / "study")
    evaluate(run, table, tmp_path / "out")
    assert told in capsys.readouterr().out


def test_labels_must_be_classes_of_the_run(run: Path, tmp_path: Path) -> None:
    table = write_external(run.parent / "study", "x,y,bright,new0c.png,new1o.png")
    with pytest.raises(ManifestError, match="row 12: label must be dark, grey or light, got 'bright'"):
        evaluate(run, table, tmp_path / "out")


@pytest.mark.parametrize(
    ("manifest", "out", "message"),
    [
        ("external.csv", None, "manifest and out must be given together"),
        (None, "out", "manifest and out must be given together"),
        ("external.csv", ".", "out must be a new or empty folder"),
        ("external.csv", "run", "out must be a new or empty folder"),
        ("external.csv", "study/manifest.csv", "out must be a new or empty folder"),
    ],
)
def test_where_it_may_not_go(run: Path, manifest: str | None, out: str | None, message: str) -> None:
    table = write_external(run.parent / "study")
    with pytest.raises(ValueError, match=message):
        evaluate(run, table if manifest else None, run.parent / out if out else None)
