"""What the readers of all data sets share: where the manifest may lie, and that nothing is written by halves."""

import csv
import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from ei.config import DataConfig
from ei.data.manifest import read_manifest
from ei.data.prepare import Case, Prepared, Skip, Source, prepare

FOLDER = "images"


@dataclass(frozen=True)
class Made(Source):
    """Two cases in a folder of choice."""

    names: Sequence[str] = ("a.png", "b.png")
    splits: Sequence[str] = ("train", "test")
    skipped: Sequence[Skip] = (Skip("train", "=z", "no image"),)

    def read(self) -> Prepared:
        cases = [
            Case(f"-c{number}", f"p{number}", split, {"label": label}, {"oct": (self.root / FOLDER / name,)})
            for number, (name, split, label) in enumerate(zip(self.names, self.splits, ("dry", "wet"), strict=True))
        ]
        return Prepared(cases, self.skipped, (), ("oct",), ("label",), ("wet", "dry"), ("--classes", "wet,dry"))


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "set" / FOLDER).mkdir(parents=True)
    for grey, name in enumerate(("a.png", "b.png")):
        Image.new("L", (2, 2), grey).save(tmp_path / "set" / FOLDER / name)
    return tmp_path / "set"


def test_paths_are_relative_to_the_manifest_wherever_it_lies(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    for source in (Made(root), Made(Path("set"), Path("here.csv")), Made(root, root / FOLDER / "deep.csv")):
        command = shlex.split(prepare(source)[-1])
        path = Path(command[command.index("--manifest") + 1])
        config = DataConfig(modalities=("oct",), classes=tuple(command[command.index("--classes") + 1].split(",")))
        manifest = read_manifest(path, config)
        assert [row.images["oct"][0].resolve().name for row in manifest.rows] == ["a.png", "b.png"]
        assert [row.label for row in manifest.rows] == [1, 0]
    assert "\n'-c0,p0,train,dry,set/images/a.png\n" in Path("here.csv").read_text()
    assert command[:4] == ["next:", "ei", "train", "--manifest"]


@pytest.mark.fault("formulas in the lists of a data set", "text in its manifest")
def test_no_cell_of_either_file_is_a_formula(root: Path) -> None:
    for grey, name in enumerate(("@a.png", "-b.png")):
        Image.new("L", (2, 2), grey).save(root / FOLDER / name)
    prepare(Made(root, root / FOLDER / "m.csv", names=("@a.png", "-b.png")))
    cells = [cell for file in ("m.csv", "skipped.csv") for row in table(root / FOLDER / file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert {"'=z", "'-c0", "./@a.png", "./-b.png"} <= set(cells)
    manifest = read_manifest(root / FOLDER / "m.csv", DataConfig(modalities=("oct",)))
    assert [row.images["oct"][0].name for row in manifest.rows] == ["@a.png", "-b.png"]


def test_images_that_a_manifest_could_not_refer_to(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="out must lie in a folder above all images, got .*elsewhere, but .*a.png"):
        prepare(Made(root, root.parent / "elsewhere" / "m.csv"))
    (root / FOLDER / "a.png").rename(root.parent / "elsewhere" / "a.png")
    (root / FOLDER / "a.png").symlink_to(root.parent / "elsewhere" / "a.png")
    with pytest.raises(ValueError, match="out must lie in a folder above all images, got .*set, but .*elsewhere/a.png"):
        prepare(Made(root))
    prepare(Made(root, root.parent / "m.csv"))
    read_manifest(root.parent / "m.csv", DataConfig(modalities=("oct",)))
    with pytest.raises(ValueError, match="no semicolon and no space at either end, got 'images/a;b.png'"):
        prepare(Made(root, names=("a;b.png", "b.png")))


def test_a_file_of_somebody_else_is_not_replaced(root: Path) -> None:
    prepare(Made(root))
    prepare(Made(root))
    for name in ("manifest.csv", "skipped.csv"):
        kept = (root / name).read_bytes()
        (root / name).write_text("id,label\n1,x\n")
        with pytest.raises(ValueError, match=f"{name} is there and was not written by this command"):
            prepare(Made(root))
        assert (root / name).read_text() == "id,label\n1,x\n"
        (root / name).write_bytes(kept)
    for out, message in (
        ("x/m.csv", "a folder that exists"),
        (FOLDER, "a plain file"),
        ("skipped.csv", "another name"),
    ):
        with pytest.raises(ValueError, match=f"out must .*{message}"):
            prepare(Made(root, root / out))


def test_both_files_or_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file meets a full disk; the ones that were there stay, and nothing else is left."""
    prepare(Made(root))
    before = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(Made(root, splits=("train", "val"), skipped=()))
    assert {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()} == before
    assert sorted(before) == ["manifest.csv", "skipped.csv"]


def test_nothing_to_train_on(root: Path) -> None:
    with pytest.raises(ValueError, match="has no case left to train on: all 1 are skipped"):
        prepare(Made(root, splits=("val", "test")))


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    """It must answer at once, and read a data set where no classifier is installed."""
    for folder in ("train", "valid"):
        for plane in ("axial", "coronal", "sagittal"):
            (tmp_path / folder / plane).mkdir(parents=True)
            for exam in ("0001", "0002") if folder == "train" else ("1130",):
                (tmp_path / folder / plane / f"{exam}.npy").write_bytes(b"x")
        for name in ("abnormal", "acl", "meniscus"):
            (tmp_path / f"{folder}-{name}.csv").write_text("0001,1\n0002,0\n" if folder == "train" else "1130,0\n")
    code = "import sys; from ei.cli import run; print(run(sys.argv[1:]), 'torch' in sys.modules)"
    words = [sys.executable, "-c", code, "prepare", "mrnet", str(tmp_path), "--partial"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert (tmp_path / "manifest.csv").read_text().count("\n") == 4
