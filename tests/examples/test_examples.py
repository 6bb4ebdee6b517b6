"""The examples run as they stand, each in an interpreter of its own."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import bench_hippocampus
import numpy as np
import pytest
from bench_methods import METHODS
from PIL import Image

from ei.comparison.methods import find_method
from ei.config import ADAPTERS, Fusion

EXAMPLES = Path(__file__).parents[2] / "examples"
SEQUENCES = ("FLAIR", "T1", "T2", "T1POST")


def run(name: str, *words: object) -> subprocess.CompletedProcess:
    # One thread: the examples are small, and more would only get into each other's way.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_inject():
    done = run("01_inject_mor.py")
    assert done.returncode == 0, done.stderr
    assert "85,498 of 608,602 parameters train" in done.stdout and "effective rank" in done.stdout


def test_peft():
    pytest.importorskip("peft")
    done = run("03_peft.py")
    assert done.returncode == 0, done.stderr
    assert "trainable params: 85,498" in done.stdout and "no merging: " in done.stdout
    reported = re.search(r"outputs of the model +(\S+%)", done.stdout)
    measured = re.search(r"merged: (\S+%)", done.stdout)
    assert reported and measured and reported[1] == measured[1]


@pytest.fixture
def patches(tmp_path) -> Path:
    """A file like the real one: three patients, 18 patches."""
    generator = np.random.default_rng(0)
    arrays = {name: generator.integers(0, 256, (18, 48, 48), dtype=np.uint8) for name in SEQUENCES}
    np.savez(tmp_path / "patches.npz", label=np.arange(18) % 2, patient=np.repeat([7, 19, 26], 6), **arrays)
    return tmp_path / "patches.npz"


def test_brain_mri_patches_become_manifests(patches, tmp_path):
    done = run("02_brain_mri_patches.py", patches, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    source = np.load(patches)
    for held_out in (7, 19, 26):
        with open(tmp_path / f"out/leave_out_{held_out:02d}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 18
        for number, row in enumerate(rows):
            assert (row["split"] == "test") == (row["patient"] == f"patient{held_out:02d}")
            assert row["label"] == ("lesion" if source["label"][number] else "no_lesion")
            pixels = np.asarray(Image.open(tmp_path / "out" / row["T2"]))
            assert np.array_equal(pixels, source["T2"][number])


def test_brain_mri_says_what_it_needs(tmp_path):
    assert "python examples/02_brain_mri_patches.py" in run("02_brain_mri_patches.py").stderr
    np.savez(tmp_path / "other.npz", FLAIR=np.zeros(1))
    assert (
        "lacks the arrays T1, T1POST, T2, label, patient"
        in run("02_brain_mri_patches.py", tmp_path / "other.npz", tmp_path).stderr
    )


@pytest.mark.slow
def test_the_benchmark_of_methods_runs(patches, tmp_path):
    assert run("02_brain_mri_patches.py", patches, tmp_path / "out").returncode == 0
    benchmark = EXAMPLES.parent / "benchmarks/bench_methods.py"
    settings = ["--work", tmp_path / "work", "--epochs", 1, "--out", tmp_path / "result.json"]
    done = run(str(benchmark), tmp_path / "out", *settings, "--methods", "mmrad-mor")
    assert done.returncode == 0, done.stderr
    methods = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert methods == ["", "mmrad-mor"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["cells"]) == 3 and result["setup"]["versions"]


@pytest.mark.slow
def test_the_benchmark_of_digit_pairs_runs(tmp_path):
    benchmark = EXAMPLES.parent / "benchmarks/bench_digit_pairs.py"
    settings = ["--work", tmp_path / "work", "--methods", "late", "--seeds", 1, "--out", tmp_path / "result.json"]
    done = run(str(benchmark), *settings)
    assert done.returncode == 0, done.stderr
    cells = (tmp_path / "result.md").read_text().splitlines()[-1].split(" | ")
    assert cells[0] == "| late" and all(float(cell.split()[0]) < 0.6 for cell in cells[2:])
    assert str(tmp_path) not in (tmp_path / "result.json").read_text()


def test_the_benchmark_has_every_method():
    """Every fusion, and every adapter, is in it."""
    found = [find_method(name).changes.get("model", {}) for name in METHODS]
    assert {"ei"} | {model.get("fusion") for model in found} >= set(get_args(Fusion))
    assert {"full"} | {model.get("adapter") for model in found} >= set(ADAPTERS)


@pytest.fixture
def volumes(tmp_path) -> Path:
    """A file like the real one: 24 cases, 8 to each split."""
    generator = np.random.default_rng(0)
    labels = np.array([[k % 2, k // 2 % 2, 1 - k % 2] for k in range(24)], dtype=np.uint8)
    np.savez(
        tmp_path / "volumes.npz",
        volumes=generator.integers(0, 256, (24, 48, 64, 48), dtype=np.uint8),
        labels=labels,
        split=np.repeat(["train", "valid", "test"], 8),
        case=[f"case{k:02d}" for k in range(24)],
    )
    return tmp_path / "volumes.npz"


def test_the_benchmark_of_planes_says_what_writes_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_hippocampus.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench_hippocampus.main()
    assert "manifest.csv is no file; examples/04_hippocampus_planes.py writes it" in capsys.readouterr().err


@pytest.mark.slow
def test_hippocampus_planes_become_a_manifest_and_the_benchmark_runs(volumes, tmp_path):
    done = run("04_hippocampus_planes.py", volumes, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    source = np.load(volumes)
    with open(tmp_path / "out/manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 8 + ["val"] * 8 + ["test"] * 8
    for number, row in enumerate(rows):
        volume = source["volumes"][number]
        read = {plane: np.load(tmp_path / "out" / row[plane]) for plane in ("axial", "coronal", "sagittal")}
        assert np.array_equal(read["axial"][5], volume[:, :, 5])
        assert np.array_equal(read["coronal"][6], volume[:, 6])
        assert np.array_equal(read["sagittal"][7], volume[7])
        names = ("small_total", "small_anterior", "small_posterior")
        assert [int(row[name]) for name in names] == source["labels"][number].tolist()
    benchmark = EXAMPLES.parent / "benchmarks/bench_hippocampus.py"
    done = run(str(benchmark), tmp_path / "out", "--epochs", 1, "--seeds", 1, "--out", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    methods = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")][-5:]
    assert methods == ["axial", "coronal", "sagittal", "late fusion", "EI"]
