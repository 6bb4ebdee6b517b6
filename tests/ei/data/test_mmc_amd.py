"""MMC-AMD: the published layout, file for file with generated images, becomes pairs by eye."""

import csv
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from ei.cli import run
from ei.config import DataConfig
from ei.data.manifest import read_manifest
from ei.data.mmc_amd import CLASSES, RELEASED, MmcAmd
from ei.data.prepare import prepare

# Eye, and the ends of its CFP and OCT images' names. The lists are not sorted in the release either.
EYES = {
    "train": [
        ("h-176037", ["_32"], ["_16"]),
        ("h-203963", ["_32"], ["_17", "_15"]),
        ("d-43655442-r", [""], [""]),
        ("w-43655442-l", [""], [""]),
        ("w-28559-r", [""], ["_002", "_000", "_001"]),
        ("p-ICG-4707-r", [""], ["_001", "_000"]),
        ("p-44338220", ["_001", "_000"], [""]),
        ("w-ICG-4022-l", [""], ["_2014"]),
        ("h-58392", ["_32"], []),
        ("d-16662366", [], [""]),
    ],
    "val": [
        ("h-178190", ["_32"], ["_16"]),
        ("d-XH1370539-l", [""], ["_000"]),
        ("w-XH1370539-r", [""], [""]),
        ("p-43983698", [""], [""]),
        ("h-97112", ["_32"], []),
    ],
    "test": [
        ("h-174290", ["_32"], ["_16"]),
        ("d-27662-r", [""], ["_001", "_002"]),
        ("p-ICG-4018-r", [""], [""]),
        ("w-1544817", [""], [""]),
    ],
}
Eyes = dict[str, list[tuple[str, list[str], list[str]]]]


def write_release(
    root: Path,
    eyes: Eyes = EYES,
    split: str = "AP",
    folders: Sequence[str] = ("cfp-clahe-448x448", "oct-median3x3-448x448"),
    pixels: bool = True,
) -> Path:
    """VisualSearch/ with the three folders of a split; without ``pixels``, images are one byte each."""
    home = root / "VisualSearch"
    data = home / "mmc-amd" / "ImageData"
    for folder in folders:
        (data / folder).mkdir(parents=True)
    for name, members in eyes.items():
        collection = home / f"mmc-amd-split{split}-{name}"
        for folder in ("ImageSets", "EyeSets", "SubjectSets", "annotations"):
            (collection / folder).mkdir(parents=True)
        (collection / "ImageData").symlink_to("../mmc-amd/ImageData")
        for which, (modality, letter) in enumerate((("cfp", "f"), ("oct", "o"))):
            ids = [f"{letter}-{eye[0]}{end}" for eye in members for end in eye[1 + which]]
            labels = [f"{image} {'hdpw'.index(image[2])}" for image in ids]
            write_lines(collection / "ImageSets" / f"{modality}.txt", ids)
            write_lines(collection / "EyeSets" / f"{modality}.txt", sorted({image[2:].split("_")[0] for image in ids}))
            write_lines(collection / "SubjectSets" / f"{modality}.txt", [])
            write_lines(collection / "annotations" / f"{modality}.txt", list(reversed(labels)))
            for image in ids:
                write_image(data / folders[which] / f"{image}.jpg", 40 + 60 * "hdpw".index(image[2]), pixels)
        if name != "train":
            pairs = [f"f-{eye}{cfp[0]} o-{eye}{end}" for eye, cfp, oct_ends in members if cfp for end in oct_ends]
            write_lines(collection / "ImageSets" / "mm.txt", pairs)
    return home


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def write_image(path: Path, grey: int, pixels: bool) -> None:
    if pixels:
        # The comment makes each file another one.
        Image.new("RGB", (16, 16), (grey, grey, grey)).save(path, comment=path.name)
    else:
        path.write_bytes(b"x")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return write_release(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_pairs_are_eyes_with_both_kinds_of_images(home: Path) -> None:
    lines = prepare(MmcAmd(home, partial=True))
    rows = table(home / "manifest.csv")
    assert [row["id"] for row in rows if row["split"] == "train"] == [eye for eye, *_ in EYES["train"][:8]]
    assert [(row["id"], row["label"]) for row in rows if row["split"] == "test"] == [
        ("h-174290", "normal"),
        ("d-27662-r", "dryAMD"),
        ("p-ICG-4018-r", "PCV"),
        ("w-1544817", "wetAMD"),
    ]
    by_id = {row["id"]: row for row in rows}
    assert by_id["h-176037"]["cfp"] == "mmc-amd/ImageData/cfp-clahe-448x448/f-h-176037_32.jpg"
    assert by_id["h-176037"]["oct"] == "mmc-amd/ImageData/oct-median3x3-448x448/o-h-176037_16.jpg"
    assert [name[-7:] for name in by_id["w-28559-r"]["oct"].split(";")] == ["000.jpg", "001.jpg", "002.jpg"]
    assert len(by_id["p-44338220"]["cfp"].split(";")) == 2
    assert by_id["d-43655442-r"]["patient"] == by_id["w-43655442-l"]["patient"] == "43655442"
    assert by_id["p-ICG-4707-r"]["patient"] == "ICG-4707"
    assert table(home / "skipped.csv") == [
        {"split": "train", "item": "h-58392", "reason": "no OCT image"},
        {"split": "train", "item": "d-16662366", "reason": "no CFP image"},
        {"split": "val", "item": "h-97112", "reason": "no OCT image"},
    ]
    assert "skipped: train h-58392: no OCT image" in lines
    counts = {line.split()[0]: line.split()[1:] for line in lines if line.split()[0] in (*EYES, "cases")}
    assert counts == {
        "cases": ["normal", "dryAMD", "PCV", "wetAMD"],
        "train": ["8", "2", "1", "2", "3"],
        "val": ["4", "1", "1", "1", "1"],
        "test": ["4", "1", "1", "1", "1"],
    }


def test_labels_are_the_releases_numbers_in_order(home: Path) -> None:
    prepare(MmcAmd(home, partial=True))
    manifest = read_manifest(home / "manifest.csv", DataConfig(modalities=("cfp", "oct"), classes=CLASSES))
    assert {row.id: row.label for row in manifest.split("val")} == {
        "h-178190": 0,
        "d-XH1370539-l": 1,
        "w-XH1370539-r": 3,
        "p-43983698": 2,
    }


def test_other_folder_names(tmp_path: Path) -> None:
    home = write_release(tmp_path, folders=("cfp-448x448", "oct"))
    with pytest.raises(
        ValueError, match="cfp-clahe-448x448 must be a folder; .* holds cfp-448x448, oct; .*--cfp-folder"
    ):
        prepare(MmcAmd(home, partial=True))
    prepare(MmcAmd(tmp_path, partial=True, cfp_folder="cfp-448x448", oct_folder="oct", out=home / "m.csv"))
    assert table(home / "m.csv")[0]["oct"] == "mmc-amd/ImageData/oct/o-h-176037_16.jpg"


def test_synthetic_images_are_left_out(tmp_path: Path) -> None:
    eyes = EYES | {"train": [*EYES["train"], ("p-43199439-l-trs", [""], [""]), ("w-17265861", [""], ["_000-flr"])]}
    home = write_release(tmp_path, eyes)
    prepare(MmcAmd(home, partial=True))
    reasons = {row["item"]: row["reason"] for row in table(home / "skipped.csv")}
    assert reasons["f-p-43199439-l-trs"] == reasons["o-w-17265861_000-flr"] == "a synthetic image"
    assert reasons["w-17265861"] == "no OCT image"
    assert not any("p-43199439" in row["id"] for row in table(home / "manifest.csv"))


def test_split_a_keeps_fellow_eyes_apart_and_says_so(tmp_path: Path) -> None:
    eyes = EYES | {"test": [*EYES["test"], ("d-ICG-4707-l", [""], [""])]}
    home = write_release(tmp_path, eyes, split="A")
    lines = prepare(MmcAmd(home, partial=True, split="A"))
    assert "note: 1 patients have an eye in one split and the fellow eye in another; AP has none" in lines
    assert {row["patient"] for row in table(home / "manifest.csv")} >= {"p-ICG-4707-r", "d-ICG-4707-l"}
    read_manifest(home / "manifest.csv", DataConfig(modalities=("cfp", "oct")))


def whole_release() -> Eyes:
    """Eyes by the published counts: images and pairs per split."""
    eyes: Eyes = {}
    for number, (split, pairs, cfp_only, oct_only) in enumerate(
        (("train", 610, 323, 49), ("val", 79, 1, 0), ("test", 79, 1, 0))
    ):
        names = [f"{'hdpw'[index % 4]}-{number}{index:04d}" for index in range(pairs + cfp_only + oct_only)]
        both = [(name, [""], [""]) for name in names[:pairs]]
        spare = RELEASED["AP"][f"{split} oct images"] - pairs - oct_only
        both[0] = (names[0], ["", "_2"] if split == "train" else [""], ["", *(f"_{n:03d}" for n in range(spare))])
        eyes[split] = [
            *both,
            *((name, [""], []) for name in names[pairs : pairs + cfp_only]),
            *((name, [], [""]) for name in names[pairs + cfp_only :]),
        ]
    return eyes


def test_the_whole_release_and_a_half_unpacked_one(tmp_path: Path) -> None:
    home = write_release(tmp_path, whole_release(), pixels=False)
    lines = prepare(MmcAmd(home))
    splits = [row["split"] for row in table(home / "manifest.csv")]
    assert [splits.count(name) for name in ("train", "val", "test")] == [610, 79, 79]
    assert "skipped in train: 323, no OCT image" in lines and "skipped in train: 49, no CFP image" in lines
    assert len(table(home / "skipped.csv")) == 374

    before = (home / "manifest.csv").read_bytes()
    folder = home / "mmc-amd" / "ImageData" / "oct-median3x3-448x448"
    for file in sorted(folder.iterdir())[1000:]:
        file.unlink()
    with pytest.raises(
        ValueError, match="289 of the 2383 images in ImageSets are missing or empty, .*unpacked"
    ) as error:
        prepare(MmcAmd(home))
    assert "\n" not in str(error.value) and "--partial" in str(error.value)
    assert (home / "manifest.csv").read_bytes() == before
    listing = home / "mmc-amd-splitAP-val" / "ImageSets" / "oct.txt"
    listing.write_text("".join(listing.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(
        ValueError, match="got 133 val oct images instead of 134, 78 val pairs instead of 79; is the arch"
    ):
        prepare(MmcAmd(home))


def test_a_part_takes_what_is_there(home: Path) -> None:
    folder = home / "mmc-amd" / "ImageData" / "oct-median3x3-448x448"
    (folder / "o-w-28559-r_000.jpg").unlink()
    (folder / "o-p-44338220.jpg").write_bytes(b"")
    prepare(MmcAmd(home, partial=True))
    rows = {row["id"]: row for row in table(home / "manifest.csv")}
    assert len(rows["w-28559-r"]["oct"].split(";")) == 2 and "p-44338220" not in rows
    skipped = {row["item"]: row["reason"] for row in table(home / "skipped.csv")}
    assert skipped["o-w-28559-r_000"] == skipped["o-p-44338220"] == "no such file"
    assert skipped["p-44338220"] == "no OCT image"


TRAIN, VAL = "mmc-amd-splitAP-train", "mmc-amd-splitAP-val"
CFP, OCT = f"{TRAIN}/ImageSets/cfp.txt", f"{TRAIN}/ImageSets/oct.txt"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda home: (home / "mmc-amd").rename(home / "mmc"), "must be the folder VisualSearch .*holds .*mmc"),
        (lambda home: (home / TRAIN).rename(home / "x"), f"{TRAIN} must be a folder; .*unpacked completely"),
        (lambda home: (home / OCT).unlink(), "oct.txt cannot be read: No such file"),
        (lambda home: (home / OCT).write_bytes(b"o-\xff"), "must be a text in UTF-8, got byte 0xff"),
        (lambda home: edit(home / CFP, "f-h-176037_32", "f-x-1"), "image ids such as f-.*'f-x-1'"),
        (lambda home: edit(home / CFP, "f-h-58392", "o-h-58392"), "image ids such as f-"),
        (lambda home: edit(home / CFP, "f-h-58392", "f-h-../58392"), "image ids such as f-"),
        (lambda home: edit(home / VAL / "ImageSets/cfp.txt", "f-h-97112_32", "f-h-178190_32"), "'f-h-178190_32' more"),
        (lambda home: edit(home / VAL / "annotations/oct.txt", "o-p-43983698 2", "o-p-43983698 3"), "label 2, got 3"),
        (lambda home: edit(home / VAL / "annotations/oct.txt", "o-p-43983698 2\n", ""), "label 2, got none"),
    ],
)  # fmt: skip
def test_a_fault(home: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(home)
    with pytest.raises(ValueError, match=message) as error:
        prepare(MmcAmd(home, partial=True))
    assert "\n" not in str(error.value)
    assert not (home / "manifest.csv").exists() and not (home / "skipped.csv").exists()


def test_an_eye_or_a_patient_in_two_splits(tmp_path: Path) -> None:
    eye = write_release(tmp_path / "a", EYES | {"val": [*EYES["val"], ("h-176037", ["_33"], ["_17"])]})
    with pytest.raises(ValueError, match="the three splits must name everything once, got 'h-176037'"):
        prepare(MmcAmd(eye, partial=True))
    patient = write_release(tmp_path / "b", EYES | {"val": [*EYES["val"], ("d-28559-l", [""], [""])]})
    with pytest.raises(ValueError, match="no patient in two splits, got 28559"):
        prepare(MmcAmd(patient, partial=True))


def test_a_run_on_it(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command that ei prepare prints, with the shipped configuration that it names, and a small backbone."""
    assert run(["prepare", "mmc-amd", str(home), "--out", str(home / "manifest.csv"), "--partial"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: ei "))
    assert command[-2:] == ["--config", "mmc-amd-clip"]
    small = "--backbone tiny --image-size 32 --epochs 1 --stages 2 --bootstrap 0 --device cpu --out"
    assert run([*command, *small.split(), str(tmp_path / "run")]) == 0
    rows = table(tmp_path / "run" / "predictions.csv")
    assert len(rows) == 8 and [name for name in rows[0] if name.startswith("fused:")] == [f"fused:{c}" for c in CLASSES]
