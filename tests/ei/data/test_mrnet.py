"""MRNet: the published layout, file for file with generated volumes, becomes exams of three series."""

import csv
import hashlib
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ei.cli import run
from ei.config import Config, find_config
from ei.data.manifest import read_manifest
from ei.data.mrnet import HELD_OUT, MRNet
from ei.data.prepare import prepare

PLANES = {"axial": 17, "coronal": 23, "sagittal": 61}
# Abnormal, acl, meniscus.
EXAMS = {
    "train": {"0000": "100", "0001": "111", "0002": "000", "0003": "101", "0004": "110", "0005": "100"},
    "valid": {"1130": "000", "1131": "111"},
}


def write_release(
    root: Path, exams: dict[str, dict[str, str]] = EXAMS, pixels: bool = True, end_of_line: str = "\n"
) -> Path:
    """MRNet-v1.0/; without ``pixels``, volumes are one byte each. CRLF comes without a last end of line."""
    home = root / "MRNet-v1.0"
    for folder, flags in exams.items():
        for plane, slices in PLANES.items():
            (home / folder / plane).mkdir(parents=True)
            for number, exam in enumerate(flags):
                file = home / folder / plane / f"{exam}.npy"
                if pixels:
                    np.save(file, np.full((slices + number, 256, 256), 10 * number + (folder == "valid"), np.uint8))
                else:
                    file.write_bytes(b"x")
        for position, name in enumerate(("abnormal", "acl", "meniscus")):
            text = end_of_line.join(f"{exam},{values[position]}" for exam, values in flags.items())
            path = home / f"{folder}-{name}.csv"
            path.write_bytes((text + ("\n" if end_of_line == "\n" else "")).encode())
    return home


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return write_release(tmp_path, pixels=False)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_exams_labels_and_splits(home: Path) -> None:
    lines = prepare(MRNet(home, partial=True))
    rows = table(home / "manifest.csv")
    assert [(row["id"], row["split"]) for row in rows] == [
        ("0000", "val"),
        *((f"000{number}", "train") for number in range(1, 6)),
        ("1130", "test"),
        ("1131", "test"),
    ]
    assert [row["abnormal"] + row["acl"] + row["meniscus"] for row in rows] == [
        flags for exams in EXAMS.values() for flags in exams.values()
    ]
    assert rows[0]["sagittal"] == "train/sagittal/0000.npy" and rows[7]["axial"] == "valid/axial/1131.npy"
    counts = [line.split() for line in lines if line.split()[0] in ("cases", "train", "val", "test")]
    assert counts == [
        ["cases", "abnormal", "meniscus", "acl"],
        ["train", "5", "4", "2", "2"],
        ["val", "1", "1", "0", "0"],
        ["test", "2", "1", "1", "1"],
    ]


def test_label_order_is_abnormal_meniscus_acl(tmp_path: Path) -> None:
    home = write_release(tmp_path)
    assert prepare(MRNet(home, partial=True))[-1].endswith(" --config mrnet-clip")
    manifest = read_manifest(home / "manifest.csv", Config.load(find_config("mrnet-clip")).data)
    assert {row.id: row.label for row in manifest.split("train")} == {
        "0001": (1, 1, 1),
        "0002": (0, 0, 0),
        "0003": (1, 1, 0),
        "0004": (1, 0, 1),
        "0005": (1, 0, 0),
    }


def test_line_ends_of_another_system(tmp_path: Path) -> None:
    prepare(MRNet(write_release(tmp_path / "a", pixels=False), partial=True))
    prepare(MRNet(write_release(tmp_path / "b", pixels=False, end_of_line="\r\n"), partial=True))
    first, second = (tmp_path / name / "MRNet-v1.0" / "manifest.csv" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_papers_held_out_exams() -> None:
    """No data set in reach tells a wrong number of the list from a right one, so its digest does."""
    digest = hashlib.sha256(" ".join(HELD_OUT).encode()).hexdigest()
    assert digest == "b9499fd536e02a86627cffacf0d14c8d36590af1e8e38ecb81227aae80313fe0"
    assert len(set(HELD_OUT)) == 120


def test_held_out_by_a_seed(home: Path) -> None:
    def held_out(seed: int) -> set[str]:
        prepare(MRNet(home, partial=True, seed=seed, held_out=3))
        return {row["id"] for row in table(home / "manifest.csv") if row["split"] == "val"}

    drawn = [held_out(seed) for seed in range(4)]
    assert all(len(exams) == 3 and exams < EXAMS["train"].keys() for exams in drawn)
    assert [held_out(seed) for seed in range(4)] == drawn and any(exams != drawn[0] for exams in drawn)
    with pytest.raises(ValueError, match="held_out must be at least 0 and below the 6 exams, got 120"):
        prepare(MRNet(home, partial=True, seed=0))


def whole_release() -> dict[str, dict[str, str]]:
    """Exams by the published counts of each combination of findings."""
    combinations = {
        "train": {"000": 217, "100": 433, "101": 272, "110": 83, "111": 125},
        "valid": {"000": 25, "100": 20, "101": 21, "110": 23, "111": 31},
    }
    first = {"train": 0, "valid": 1130}
    return {
        folder: {
            f"{number:04d}": flags
            for number, flags in enumerate((f for f, count in counts.items() for _ in range(count)), first[folder])
        }
        for folder, counts in combinations.items()
    }


def test_the_whole_release_and_a_half_unpacked_one(tmp_path: Path) -> None:
    home = write_release(tmp_path, whole_release(), pixels=False)
    prepare(MRNet(home))
    rows = table(home / "manifest.csv")
    splits = [row["split"] for row in rows]
    assert [splits.count(name) for name in ("train", "val", "test")] == [1010, 120, 120]
    assert {row["id"] for row in rows if row["split"] == "val"} == set(HELD_OUT)

    before = (home / "manifest.csv").read_bytes()
    for number in range(800, 1130):
        (home / "train" / "sagittal" / f"{number:04d}.npy").unlink()
    with pytest.raises(ValueError, match="330 of the 3750 images in the label files .*first is .*sagittal/0800.npy"):
        prepare(MRNet(home))
    assert (home / "manifest.csv").read_bytes() == before
    (home / "valid-acl.csv").write_text((home / "valid-acl.csv").read_text().replace("1249,1", "1249,0"))
    with pytest.raises(ValueError, match="got 53 valid acl instead of 54; is the archive"):
        prepare(MRNet(home))


def test_a_part_takes_what_is_there(home: Path) -> None:
    (home / "train/coronal/0002.npy").unlink()
    (home / "train/sagittal/0002.npy").write_bytes(b"")
    (home / "valid/axial/1200.npy").write_bytes(b"x")
    lines = prepare(MRNet(home, partial=True))
    assert "0002" not in {row["id"] for row in table(home / "manifest.csv")}
    assert table(home / "skipped.csv") == [
        {"split": "train", "item": "0002", "reason": "no file of its coronal and sagittal series"},
        {"split": "none", "item": "valid/axial/1200.npy", "reason": "no label of this exam"},
    ]
    assert "skipped: train 0002: no file of its coronal and sagittal series" in lines


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda home: (home / "train").rename(home / "x"), "must be the folder MRNet-v1.0 of the release"),
        (lambda home: (home / "valid").rename(home / "x"), "valid/axial must be a folder; .*valid does not exist"),
        (lambda home: (home / "train/coronal").rename(home / "x"), "coronal must be a folder; .*axial, sagittal;"),
        (lambda home: (home / "train-acl.csv").unlink(), "train-acl.csv cannot be read: No such file"),
        (lambda home: edit(home / "train-acl.csv", "0000,", "exam,"), "no header, got 'exam,0' in line 1"),
        (lambda home: edit(home / "train-acl.csv", "0003,", "3,"), "lines such as 0000,1 .* got '3,0' in line 4"),
        (lambda home: edit(home / "train-acl.csv", "0003,0", "0003;0"), "got '0003;0' in line 4"),
        (lambda home: edit(home / "train-acl.csv", "0003,0", "0003,2"), "got '0003,2' in line 4"),
        (lambda home: edit(home / "train-acl.csv", "0003,0", "0003,0,1"), "got '0003,0,1' in line 4"),
        (lambda home: edit(home / "train-acl.csv", "0003,", "0002,"), "everything once, got '0002'"),
        (lambda home: edit(home / "train-acl.csv", "0003,0\n", ""), "the same exams, got 0003 .1 in all. in one"),
        (lambda home: edit(home / "train-acl.csv", "0002,0", "0002,1"), "1 for every .*got 0 for 0002;.*swapped"),
        (lambda home: edit(home / "train-meniscus.csv", "0003,", "1131,"), "the same exams, got 0003 .2 in all."),
    ],
)  # fmt: skip
def test_a_fault(home: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(home)
    with pytest.raises(ValueError, match=message) as error:
        prepare(MRNet(home, partial=True))
    assert "\n" not in str(error.value)
    assert not (home / "manifest.csv").exists() and not (home / "skipped.csv").exists()


def test_an_exam_in_train_and_valid(tmp_path: Path) -> None:
    home = write_release(tmp_path, EXAMS | {"valid": {"0003": "000"}}, pixels=False)
    with pytest.raises(ValueError, match="train and valid must name everything once, got '0003'"):
        prepare(MRNet(home, partial=True))


def test_a_run_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command that ei prepare prints, with the shipped configuration that it names, and a small backbone."""
    home = write_release(tmp_path, EXAMS | {"train": EXAMS["train"] | {"0011": "111", "0017": "000"}})
    assert run(["prepare", "mrnet", str(home), "--partial"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: ei "))
    assert command[-2:] == ["--config", "mrnet-clip"]
    small = "--backbone tiny --image-size 32 --epochs 1 --stages 2 --bootstrap 0 --device cpu --out"
    assert run([*command, *small.split(), str(tmp_path / "run")]) == 0
    rows = table(tmp_path / "run" / "predictions.csv")
    assert [name for name in rows[0] if name.startswith("fused:")] == ["fused:abnormal", "fused:meniscus", "fused:acl"]
