"""Derm7pt: the published layout, file for file with generated images, becomes pairs of images in five groups."""

import csv
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ei.cli import run
from ei.config import Config, DataConfig, find_config
from ei.data.derm7pt import COLUMNS, GROUPS, RELEASED, Derm7pt
from ei.data.manifest import read_manifest
from ei.data.prepare import prepare

# Diagnosis, clinic, derm. The files have these names.
CASES = [
    ("basal cell carcinoma", "NEL/NEL025.JPG", "NEL/Nel026.jpg"),
    ("blue nevus", "NEL/NEL027.JPG", "NEL/Nel028.jpg"),
    ("reed or spitz nevus", "FCL/Fcl068.jpg", "FCL/Fcl069.JPG"),
    ("melanoma", "A1l/Aal001.jpg", "A1l/Aal002.jpg"),
    ("melanoma (in situ)", "A1l/Aal003.jpg", "A1l/Aal004.jpg"),
    ("melanoma (less than 0.76 mm)", "A1l/Aal005.jpg", "A1l/Aal006.jpg"),
    ("melanoma (0.76 to 1.5 mm)", "A1l/Aal007.jpg", "A1l/Aal008.jpg"),
    ("melanoma (more than 1.5 mm)", "A1l/Aal009.jpg", "A1l/Aal010.jpg"),
    ("melanoma metastasis", "A1l/Aal011.jpg", "A1l/Aal012.jpg"),
    ("seborrheic keratosis", "Gll/Gll013.jpg", "Gll/Gll013.jpg"),
    ("vascular lesion", "Gll/Gll015.jpg", "Gll/Gll016.jpg"),
    ("clark nevus", "Gll/Gll017.jpg", "Gll/Gll018.jpg"),
]
SPLITS = {"train": [11, 0, 1, 3, 4, 9, 10], "valid": [2, 5, 6], "test": [7, 8]}
NOTE_OF_A_COPY = "Clinical missing and replaced with derm"


def write_release(
    root: Path,
    cases: list[tuple[str, str, str]] = CASES,
    splits: dict[str, list[int]] = SPLITS,
    pixels: bool = True,
) -> Path:
    """release_v0/; without ``pixels``, images are one byte each."""
    home = root / "release_v0"
    (home / "meta").mkdir(parents=True)
    for name in ("README.txt", "clinic.html", "derm.html"):
        (home / name).write_text("generated for a test\n")
    with (home / "meta" / "meta.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="absent", lineterminator="\n")
        writer.writeheader()
        for number, (diagnosis, clinic, derm) in enumerate(cases, start=1):
            notes = NOTE_OF_A_COPY if clinic == derm else ""
            cells = {"case_num": number, "diagnosis": diagnosis, "clinic": clinic, "derm": derm}
            writer.writerow(cells | {"seven_point_score": 0, "case_id": "", "notes": notes})
    for split, rows in splits.items():
        (home / "meta" / f"{split}_indexes.csv").write_text("".join(f"{line}\n" for line in ("indexes", *rows)))
    for _, *names in cases:
        for name in names:
            file = home / "images" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if pixels:
                size = (724, 512) if name == "Gll/Gll018.jpg" else (96, 64)
                # The comment makes each file another one.
                Image.new("RGB", size, (90, 60, 50)).save(file, "JPEG", comment=name)
            else:
                file.write_bytes(b"x")
    return home


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return write_release(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_indexes_are_rows_from_0_and_cases_count_from_1(home: Path) -> None:
    lines = prepare(Derm7pt(home, partial=True))
    rows = table(home / "manifest.csv")
    assert {split: [row["id"] for row in rows if row["split"] == split] for split in ("train", "val", "test")} == {
        "train": ["1", "2", "4", "5", "10", "11", "12"],
        "val": ["3", "6", "7"],
        "test": ["8", "9"],
    }
    assert (rows[0]["clinic"], rows[0]["derm"]) == ("images/NEL/NEL025.JPG", "images/NEL/Nel026.jpg")
    assert [row["label"] for row in rows] == [
        "BCC", "NEV", "NEV", "MEL", "MEL", "MEL", "MEL", "MEL", "MEL", "SK", "MISC", "NEV",
    ]  # fmt: skip
    assert table(home / "skipped.csv") == []
    assert "note: case 10 of train is kept, but its clinic image is its derm image again" in lines
    counts = [line.split() for line in lines if line.split()[0] in ("cases", "train", "val", "test")]
    assert counts == [
        ["cases", "BCC", "NEV", "MEL", "SK", "MISC"],
        ["train", "7", "1", "2", "2", "1", "1"],
        ["val", "3", "0", "1", "2", "0", "0"],
        ["test", "2", "0", "0", "2", "0", "0"],
    ]


def test_sk_comes_before_misc(home: Path) -> None:
    """As in the paper; the data set's own code has MISC first."""
    assert prepare(Derm7pt(home, partial=True))[-1].endswith(" --config derm7pt-clip")
    manifest = read_manifest(home / "manifest.csv", Config.load(find_config("derm7pt-clip")).data)
    labels = {row.id: row.label for row in manifest.rows}
    assert (labels["1"], labels["2"], labels["4"], labels["10"], labels["11"]) == (0, 1, 2, 3, 4)


def test_groupings(home: Path) -> None:
    lines = prepare(Derm7pt(home, partial=True, grouping="melanoma"))
    assert lines[-1].endswith(" --config derm7pt-clip --classes other,MEL")
    assert [row["label"] for row in table(home / "manifest.csv")] == ["other"] * 3 + ["MEL"] * 6 + ["other"] * 3
    lines = prepare(Derm7pt(home, partial=True, grouping="diagnosis"))
    assert [row["label"] for row in table(home / "manifest.csv")] == [diagnosis for diagnosis, *_ in CASES]
    classes = shlex.split(lines[-1])[shlex.split(lines[-1]).index("--classes") + 1]
    read_manifest(home / "manifest.csv", DataConfig(modalities=("clinic", "derm"), classes=tuple(classes.split(","))))


def test_every_published_diagnosis_has_a_group() -> None:
    assert sorted(map(len, GROUPS.values())) == [1, 1, 5, 6, 8]
    assert tuple(GROUPS) == ("BCC", "NEV", "MEL", "SK", "MISC")


def test_cases_without_a_clinical_image_can_be_dropped(home: Path) -> None:
    prepare(Derm7pt(home, partial=True, drop_copies=True))
    assert table(home / "skipped.csv") == [
        {"split": "train", "item": "10", "reason": "its clinic image is its derm image again"}
    ]
    assert "10" not in {row["id"] for row in table(home / "manifest.csv")}


def test_another_case_of_a_path_is_resolved_and_told(home: Path) -> None:
    edit(home / "meta" / "meta.csv", "FCL/Fcl068.jpg", "FCl/Fcl068.jpg")
    lines = prepare(Derm7pt(home, partial=True))
    assert "note: meta.csv writes FCl/Fcl068.jpg, the file is FCL/Fcl068.jpg" in lines
    assert table(home / "manifest.csv")[2]["clinic"] == "images/FCL/Fcl068.jpg"
    (home / "images" / "fcl").mkdir()
    with pytest.raises(ValueError, match="FCl/Fcl068.jpg must be one file in .*, got FCL and fcl"):
        prepare(Derm7pt(home, partial=True))


def test_another_image_folder(tmp_path: Path) -> None:
    home = write_release(tmp_path)
    (home / "images").rename(home / "images_size512")
    with pytest.raises(ValueError, match="images must be a folder; .* holds .*images_size512.*--image-folder"):
        prepare(Derm7pt(home, partial=True))
    prepare(Derm7pt(tmp_path, partial=True, image_folder="images_size512"))
    assert table(tmp_path / "manifest.csv")[0]["derm"] == "release_v0/images_size512/NEL/Nel026.jpg"


def whole_release() -> tuple[list[tuple[str, str, str]], dict[str, list[int]]]:
    """Cases by the published counts of groups per split."""
    cases, splits = [], {}
    for split, name in (("test", "test"), ("train", "train"), ("val", "valid")):
        groups = [group for group, count in RELEASED[split].items() for _ in range(count)]
        splits[name] = list(range(len(cases), len(cases) + len(groups)))
        first = len(cases)
        cases += [(GROUPS[g][-1], f"F{n % 34}/{n}.jpg", f"F{n % 34}/{n}d.JPG") for n, g in enumerate(groups, first)]
    return cases, splits


def test_the_whole_release_and_a_half_unpacked_one(tmp_path: Path) -> None:
    home = write_release(tmp_path, *whole_release(), pixels=False)
    prepare(Derm7pt(home))
    splits = [row["split"] for row in table(home / "manifest.csv")]
    assert [splits.count(name) for name in ("train", "val", "test")] == [413, 203, 395]

    before = (home / "manifest.csv").read_bytes()
    for file in (home / "images" / "F3").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="60 of the 2022 images in .*meta.csv are missing or empty.*--partial"):
        prepare(Derm7pt(home))
    assert (home / "manifest.csv").read_bytes() == before
    prepare(Derm7pt(home, partial=True))
    skipped = table(home / "skipped.csv")
    assert len(skipped) == 30 and {row["reason"] for row in skipped} == {"no file of its clinic and derm image"}
    edit(home / "meta" / "meta.csv", "vascular lesion", "seborrheic keratosis")
    with pytest.raises(ValueError, match="20 test SK cases instead of 19, 39 test MISC cases instead of 40; is the"):
        prepare(Derm7pt(home))


def test_a_row_in_no_index_file_is_reported(home: Path) -> None:
    edit(home / "meta" / "valid_indexes.csv", "\n6\n", "\n")
    prepare(Derm7pt(home, partial=True))
    assert table(home / "skipped.csv") == [{"split": "none", "item": "7", "reason": "in none of the index files"}]


META, TRAIN, VALID = "meta/meta.csv", "meta/train_indexes.csv", "meta/valid_indexes.csv"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda home: (home / "meta").rename(home / "x"), "must be the folder release_v0 of the release, with meta/"),
        (lambda home: (home / META).unlink(), "meta.csv cannot be read: No such file"),
        (lambda home: (home / META).write_text(""), "meta.csv must have the columns .* it lacks case_num, diagnosis"),
        (lambda home: edit(home / META, "diagnosis", "Diagnosis"), "it lacks diagnosis$"),
        (lambda home: edit(home / META, "absent,", ""), "must have 19 cells in every row, got 18 in data row 1"),
        (lambda home: edit(home / META, "\n1,basal", '\n"1,basal'), "meta.csv must be a CSV: "),
        (lambda home: edit(home / META, "\n2,blue", "\n1,blue"), "case_num of .* everything once, got '1'"),
        (lambda home: edit(home / META, "2,blue nevus", "2,mole"), "data row 2 .* of 21 known diagnoses, got 'mole'"),
        (lambda home: edit(home / META, "NEL/NEL027.JPG", ""), "data row 2 .* must have a clinic, got an empty cell"),
        (lambda home: edit(home / META, "NEL/NEL027.JPG", "../a.jpg"), "inside of the images' folder, got '../a.jpg'"),
        (lambda home: edit(home / META, "NEL/NEL027.JPG", "/a.jpg"), "inside of the images' folder, got '/a.jpg'"),
        (lambda home: (home / VALID).unlink(), "valid_indexes.csv cannot be read"),
        (lambda home: edit(home / TRAIN, "indexes", "index"), "must have the columns indexes; it lacks indexes"),
        (lambda home: edit(home / TRAIN, "11", "12"), "must have rows of meta.csv, 0 to 11, got '12'"),
        (lambda home: edit(home / TRAIN, "11", "-1"), "must have rows of meta.csv, 0 to 11, got '-1'"),
        (lambda home: edit(home / VALID, "\n2\n", "\n0\n"), "valid_indexes.csv must .*, got 0, which is in train"),
    ],
)  # fmt: skip
def test_a_fault(home: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(home)
    with pytest.raises(ValueError, match=message) as error:
        prepare(Derm7pt(home, partial=True))
    assert "\n" not in str(error.value)
    assert not (home / "manifest.csv").exists() and not (home / "skipped.csv").exists()


def test_a_run_on_it(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command that ei prepare prints, with the shipped configuration that it names, and a small backbone."""
    assert run(["prepare", "derm7pt", str(home), "--partial"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: ei "))
    assert command[-2:] == ["--config", "derm7pt-clip"]
    small = "--backbone tiny --image-size 32 --epochs 1 --stages 2 --bootstrap 0 --device cpu --out"
    assert run([*command, *small.split(), str(tmp_path / "run")]) == 0
    rows = table(tmp_path / "run" / "predictions.csv")
    assert [name for name in rows[0] if name.startswith("fused:")] == [f"fused:{name}" for name in GROUPS]
