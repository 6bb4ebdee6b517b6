"""Manifests: what a good one becomes, and that every fault of a bad one is reported, with its row."""

import os
import pickle
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ei.data.manifest
from ei.config import DataConfig
from ei.data.audit import Facts, audit_image
from ei.data.manifest import Manifest, ManifestError, Row, read_manifest
from ei.intensity import Intensity

CONFIG = DataConfig(modalities=("cfp", "oct"))
MULTI = DataConfig(modalities=("cfp",), labels=("acl", "meniscus"))

NOT_ALLOWED = "a sample may lack a modality only in a run that is trained with --allow-missing"
GOOD = """\
id,split,label,cfp,oct
a,train,wet,a.png,a.png
b,train,dry,b.png,a.png
c,test,dry,c.png,d.png
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set's folder with a.png ... f.png and sub/c.png, no two the same; beside it lies outside.png."""
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    for level, name in enumerate([*(f"set/{letter}.png" for letter in "abcdef"), "set/sub/c.png", "outside.png"]):
        Image.new("L", (3, 2), level).save(tmp_path / name)
    return root


def read(
    folder: Path,
    text: str | bytes,
    config: DataConfig = CONFIG,
    classes: tuple[str, ...] | None = None,
    labelled: bool = True,
) -> Manifest:
    path = folder / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(path, config, classes=classes, labelled=labelled)


def problems_of(
    folder: Path,
    text: str | bytes,
    config: DataConfig = CONFIG,
    classes: tuple[str, ...] | None = None,
    labelled: bool = True,
) -> list[str]:
    with pytest.raises(ManifestError) as error:
        read(folder, text, config, classes, labelled)
    return error.value.problems


# Good manifests


def test_rows_labels_and_files(folder: Path) -> None:
    manifest = read(folder, GOOD)
    assert (manifest.modalities, manifest.classes) == (("cfp", "oct"), ("dry", "wet"))
    assert not manifest.multi_label
    assert manifest.rows[1] == Row(
        number=3,
        id="b",
        patient="b",
        split="train",
        label=0,
        images={"cfp": (folder / "b.png",), "oct": (folder / "a.png",)},
    )
    assert [row.label for row in manifest.rows] == [1, 0, 0]
    assert [row.id for row in manifest.split("train")] == ["a", "b"]
    assert manifest.split("val") == []
    with pytest.raises(ValueError, match="name must be one of train, val, test, got 'tests'"):
        manifest.split("tests")


def test_modalities_are_in_the_order_of_the_configuration(folder: Path) -> None:
    manifest = read(folder, GOOD, DataConfig(modalities=("oct", "cfp")))
    assert manifest.modalities == ("oct", "cfp")
    assert list(manifest.rows[0].images) == ["oct", "cfp"]


@pytest.mark.parametrize(
    ("argument", "configured", "order"),
    [
        (None, (), ("dry", "wet")),
        (None, ("wet", "dry"), ("wet", "dry")),
        (("wet", "normal", "dry"), ("wet", "dry"), ("wet", "normal", "dry")),
    ],
)
def test_the_order_of_classes(
    folder: Path, argument: tuple[str, ...] | None, configured: tuple[str, ...], order: tuple[str, ...]
) -> None:
    manifest = read(folder, GOOD, DataConfig(modalities=("cfp",), classes=configured), argument)
    assert manifest.classes == order
    assert [manifest.classes[row.label] for row in manifest.rows if isinstance(row.label, int)] == [
        "wet",
        "dry",
        "dry",
    ]


def test_several_label_columns_make_several_labels(folder: Path) -> None:
    text = "id,split,meniscus,acl,cfp\na,train,1,0,a.png\nb,train,0,0,b.png\n"
    for classes in (None, ("acl", "meniscus")):
        manifest = read(folder, text, MULTI, classes)
        assert manifest.multi_label
        assert manifest.classes == ("acl", "meniscus")
        assert [row.label for row in manifest.rows] == [(0, 1), (0, 0)]


def test_several_files_in_one_cell_are_sorted(folder: Path) -> None:
    text = 'id,split,label,cfp\na,train,x,"sub/c.png; b.png;a.png"\nb,train,y,a.png\n'
    row, _ = read(folder, text, DataConfig(modalities=("cfp",))).rows
    assert row.images["cfp"] == (folder / "a.png", folder / "b.png", folder / "sub/c.png")


def test_a_patient_column_groups_rows(folder: Path) -> None:
    text = "id,split,label,patient,cfp\na,train,x,p,a.png\nb,train,y,p,a.png\n"
    assert [row.patient for row in read(folder, text, DataConfig(modalities=("cfp",))).rows] == ["p", "p"]


@pytest.mark.fault("a table with {case}", "read all the same")
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\ufeff" + GOOD, id="byte order mark"),
        pytest.param(GOOD.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(GOOD.replace("\n", "\r"), id="CR"),
        pytest.param(GOOD.replace("\n", "\n\n"), id="blank lines"),
        pytest.param("\n" + GOOD, id="blank first line"),
        pytest.param(GOOD + ",,,,\n", id="a row of empty cells, as spreadsheets leave them"),
        pytest.param(GOOD.rstrip(), id="no end of line at the end"),
        pytest.param(GOOD.replace(",", " , "), id="spaces"),
    ],
)
def test_what_spreadsheets_write_is_accepted(folder: Path, text: str) -> None:
    manifest = read(folder, text)
    plain = read(folder, GOOD)
    assert [(row.id, row.label, row.images) for row in manifest.rows] == [
        (row.id, row.label, row.images) for row in plain.rows
    ]


def test_row_numbers_are_those_of_an_editor(folder: Path) -> None:
    text = '\nid,split,label,note,cfp\n\na,train,x,"two\nlines",a.png\nb,train,y,,b.png\n'
    assert [row.number for row in read(folder, text, DataConfig(modalities=("cfp",))).rows] == [4, 6]
    wrong = text.replace("b.png", "z.png").replace("id,", "key,")
    assert [problem.split(":")[0] for problem in problems_of(folder, wrong, DataConfig(modalities=("cfp",)))] == [
        "row 2",
        "row 6",
    ]


def test_a_class_without_train_rows_is_no_fault(folder: Path) -> None:
    manifest = read(folder, GOOD.replace("c,test,dry", "c,test,normal"))
    assert manifest.classes == ("dry", "normal", "wet")


def test_the_manifest_of_a_finished_run_needs_no_train_rows(folder: Path) -> None:
    text = GOOD.replace("train", "test")
    assert len(read(folder, text, classes=("dry", "wet")).split("test")) == 3
    assert problems_of(folder, text) == ["file: has no row with split train, so there is nothing to learn from"]


def test_prediction_looks_at_no_label_and_no_split(folder: Path) -> None:
    expected = [("a", "p", "", None), ("b", "q", "", None)]
    for text in (
        "id,patient,cfp\na,p,a.png\nb,q,b.png\n",
        "id,patient,label,split,cfp\na,p,?,,a.png\nb,q,,external,b.png\n",
    ):
        manifest = read(folder, text, DataConfig(modalities=("cfp",)), classes=("x", "y"), labelled=False)
        assert [(row.id, row.patient, row.split, row.label) for row in manifest.rows] == expected
        assert manifest.classes == ("x", "y")


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "images").symlink_to("sub")
    read(folder, GOOD.replace("b.png", "images/c.png"))
    read(folder, GOOD.replace("b.png", "sub/../b.png"))


# Faults, one at a time


@pytest.mark.fault("a table: {case}", "refused, with the row")
@pytest.mark.parametrize(
    ("text", "problems"),
    [
        pytest.param(
            GOOD.replace("oct", "OCT"),
            ["row 1: column 'oct' is missing; the file has id, split, label, cfp, OCT"],
            id="missing column",
        ),
        pytest.param(
            GOOD.replace("label", "diagnosis"),
            [
                "row 1: column 'label' is missing; the file has id, split, diagnosis, cfp, oct; --labels names another"
            ],
            id="labels of another name",
        ),
        pytest.param(
            "id,split,label,cfp,oct,cfp\na,train,x,a.png,a.png,b.png\nb,train,y,a.png,a.png,b.png\n",
            ["row 1: column 'cfp' is there twice"],
            id="duplicate column",
        ),
        pytest.param(GOOD.replace("c,test", "a,test"), [
            "row 4: id 'a' is already that of row 2",
            "row 4: patient 'a' is in 2 splits: train (row 2), test (row 4)",
        ], id="duplicate id"),
        pytest.param(GOOD.replace("b,train", ",train"), ["row 3: id is empty"], id="empty id"),
        pytest.param(GOOD.replace("c,test", "c,"), ["row 4: split is empty"], id="empty split"),
        pytest.param(GOOD.replace("test,dry", "test,"), ["row 4: label is empty"], id="empty label"),
        pytest.param(GOOD.replace("c.png,d.png", ",d.png"), [f"row 4: cfp is empty; {NOT_ALLOWED}"], id="empty image"),
        pytest.param(GOOD.replace("c.png,d.png", " ; ,d.png"), ["row 4: cfp names no file"], id="only a separator"),
        pytest.param(
            GOOD.replace("test", "Test"), ["row 4: split must be train, val or test, got 'Test'"], id="unknown split"
        ),
        pytest.param(
            GOOD.replace("c.png,d.png", "c.png;c.png,d.png"), ["row 4: cfp: 'c.png' is listed twice"], id="a file twice"
        ),
        pytest.param(
            GOOD.replace("c.png,d.png", "c.png,d.png,x"),
            ["row 4: has 6 cells, but the header has 5"],
            id="a cell too many",
        ),
        pytest.param(
            GOOD.replace("c.png,d.png", "a.png"),
            ["row 4: has 4 cells, but the header has 5"],
            id="a cell too few",
        ),
        pytest.param(
            GOOD.replace("dry", "wet"),
            ["file: has one class only in column 'label', 'wet'; at least two are needed"],
            id="one class",
        ),
        pytest.param(
            GOOD.replace(",", ";"),
            ["row 1: columns are separated by semicolons; save the file with commas between columns"],
            id="semicolons",
        ),
        pytest.param(
            GOOD.replace(",", "\t"),
            ["row 1: columns are separated by tabs; save the file with commas between columns"],
            id="tabs",
        ),
        pytest.param("", ["file: is empty; its first line must name the columns"], id="empty file"),
        pytest.param("id,split,label,cfp,oct\n", ["file: has no rows below the header"], id="header only"),
        pytest.param("id,split,label,cfp,oct\na\n", ["row 2: has 1 cells, but the header has 5"], id="ragged only"),
        pytest.param('"id,split\n', [
            "row 1: cannot be read, nor what follows: unexpected end of data (is a quotation mark missing?)"
        ], id="open quote in the header"),
        pytest.param(
            GOOD.encode().replace(b"wet", b"w\xe9t"),
            ["row 2: byte 0xe9 is not UTF-8; save the file as 'CSV UTF-8'"],
            id="Latin-1",
        ),
        pytest.param(
            GOOD.encode("utf-16"), ["row 1: byte 0xff is not UTF-8; save the file as 'CSV UTF-8'"], id="UTF-16"
        ),
        pytest.param(
            GOOD.encode("utf-16-le"), ["file: holds NUL bytes, so it is not a text in UTF-8"], id="UTF-16 without mark"
        ),
        pytest.param(
            GOOD.replace("b,train", '"b,train'),
            ["row 3: cannot be read, nor what follows: unexpected end of data (is a quotation mark missing?)"],
            id="open quote",
        ),
    ],
)  # fmt: skip
def test_a_fault_of_the_table(folder: Path, text: str | bytes, problems: list[str]) -> None:
    assert problems_of(folder, text) == problems


@pytest.mark.fault("a misspelt label in a run of known classes", "refused, with the row")
def test_an_unknown_label(folder: Path) -> None:
    text = GOOD.replace("c,test,dry", "c,test,drry")
    config = DataConfig(modalities=("cfp", "oct"), classes=("dry", "wet"))
    for problems in (problems_of(folder, text, config), problems_of(folder, text, classes=("dry", "wet"))):
        assert problems == ["row 4: label must be dry or wet, got 'drry'"]


@pytest.mark.fault("a flag that is neither 0 nor 1", "refused, with the row")
@pytest.mark.parametrize("value", ["2", "1.0", "yes", "-1"])
def test_a_flag_that_is_neither_0_nor_1(folder: Path, value: str) -> None:
    text = f"id,split,meniscus,acl,cfp\na,train,1,0,a.png\nb,train,{value},0,b.png\n"
    assert problems_of(folder, text, MULTI) == [f"row 3: meniscus must be 0 or 1, got '{value}'"]


def test_an_empty_flag(folder: Path) -> None:
    text = "id,split,meniscus,acl,cfp\na,train,1,0,a.png\nb,train,,0,b.png\n"
    assert problems_of(folder, text, MULTI) == ["row 3: meniscus is empty"]


MISSING = replace(CONFIG, allow_missing=True)
GAPS = """\
id,split,label,cfp,oct
a,train,wet,a.png,
b,train,dry,b.png,f.png
c,test,dry,,d.png
d,test,wet,e.png,
"""


def test_missing_modalities_where_they_are_allowed(folder: Path) -> None:
    manifest = read(folder, GAPS, MISSING)
    assert [[len(files) for files in row.images.values()] for row in manifest.rows] == [[1, 0], [1, 1], [0, 1], [1, 0]]
    assert manifest.missing() == {"cfp": {"test": 1}, "oct": {"train": 1, "test": 1}}
    assert [row.id for row in manifest.having("oct").rows] == ["b", "c"]
    assert manifest.having("oct").classes == manifest.classes
    both = manifest.rows[1]
    assert both.has_all(("cfp", "oct")) and not manifest.rows[0].has_all(("cfp", "oct"))
    assert both.only(["oct"]) == replace(both, images={"cfp": (), "oct": both.images["oct"]})
    assert read(folder, GAPS, MISSING, labelled=False).missing() == {"cfp": {"": 1}, "oct": {"": 2}}


@pytest.mark.fault("an empty cell without allow_missing", "refused by row")
@pytest.mark.parametrize("labelled", [True, False])
def test_missing_modalities_where_they_are_not(folder: Path, labelled: bool) -> None:
    rows = [(2, "oct"), (4, "cfp"), (5, "oct")]
    assert problems_of(folder, GAPS, labelled=labelled) == [
        f"row {n}: {name} is empty; {NOT_ALLOWED}" for n, name in rows
    ]


@pytest.mark.fault("a row without any image", "refused by row")
def test_a_row_without_any_image_is_always_refused(folder: Path) -> None:
    text = GAPS.replace("c,test,dry,,d.png", "c,test,dry,,")
    assert problems_of(folder, text, MISSING) == ["row 4: has no image at all: cfp, oct must not all be empty"]
    alone = replace(MISSING, modalities=("oct",))
    assert problems_of(folder, GAPS, alone) == [
        f"row {number}: has no image at all: oct must not all be empty" for number in (2, 5)
    ]


@pytest.mark.parametrize("cell", [";", "nan", "NULL"])
def test_a_missing_modality_is_an_empty_cell_and_nothing_else(folder: Path, cell: str) -> None:
    problems = problems_of(folder, GAPS.replace("a.png,\n", f"a.png,{cell}\n"), MISSING)
    assert problems[0].startswith(("row 2: oct names no file", "row 2: oct is '"))


def test_a_class_that_a_modality_never_shows_is_warned_of(folder: Path) -> None:
    warnings = [str(warning) for warning in read(folder, GAPS, MISSING).warnings]
    assert warnings == ["file: has no train row of wet with oct; the first stage cannot learn them"]


@pytest.mark.fault("a patient in several splits", "refused, with all rows")
def test_a_patient_in_several_splits_is_reported_once_with_all_rows(folder: Path) -> None:
    rows = ["a,train,p", "b,train,q", "c,val,p", "d,train,p", "e,test,p", "f,test,r"]
    lines = [f"{row},{label},{row[0]}.png" for row, label in zip(rows, "xyxyxy", strict=True)]
    text = "\n".join(["id,split,patient,label,cfp", *lines])
    assert problems_of(folder, text, DataConfig(modalities=("cfp",))) == [
        "row 4: patient 'p' is in 3 splits: train (rows 2, 5), val (row 4), test (row 6)"
    ]


def test_an_empty_patient_is_not_replaced_by_the_id(folder: Path) -> None:
    text = "id,split,label,patient,cfp\na,train,x,p,a.png\nb,train,y,,a.png\n"
    assert problems_of(folder, text, DataConfig(modalities=("cfp",))) == ["row 3: patient is empty"]


@pytest.mark.fault("the path `{written}`", "refused unopened")
@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("../outside.png", "leads out of the manifest's folder; this needs --allow-outside"),
        ("sub/../../outside.png", "leads out of the manifest's folder; this needs --allow-outside"),
        ("link.png", "leads out of the manifest's folder; this needs --allow-outside"),
        ("linked/outside.png", "leads out of the manifest's folder; this needs --allow-outside"),
        ("/etc/passwd", "is an absolute path; write it relative to the manifest, or pass --allow-outside"),
        ("C:\\images\\a.png", "is an absolute path; write it relative to the manifest, or pass --allow-outside"),
        ("\\\\server\\share\\a.png", "is an absolute path; write it relative to the manifest, or pass --allow-outside"),
        ("file:///etc/passwd", "is an address; write the path of a file, relative to the manifest"),
        ("https://example.org/a.png", "is an address; write the path of a file, relative to the manifest"),
    ],
)
def test_a_path_that_leads_out_is_refused_unopened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: str, reason: str
) -> None:
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "linked").symlink_to("..")
    opened = watch_what_is_opened(monkeypatch)
    for cell in (written, f"c.png;{written}"):
        problems = problems_of(folder, GOOD.replace("c,test,dry,c.png", f"c,test,dry,{cell}"))
        assert problems == [f"row 4: cfp: {written!r} {reason}"]
    assert {path.name for path in opened} == {"a.png", "b.png", "c.png", "d.png"}


def watch_what_is_opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    opened = []

    def audit(path: Path, intensity: Intensity) -> Facts:
        opened.append(path)
        return audit_image(path, intensity)

    monkeypatch.setattr(ei.data.manifest, "audit_image", audit)
    return opened


def make_unusable(path: Path, kind: str) -> None:
    whole = path.parent / "a.png"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "dangling":
            path.symlink_to("nowhere.png")
        case "looping":
            path.symlink_to(path.name)
        case "html":
            path.write_text("<html>")
        case "empty":
            path.touch()
        case "truncated":
            path.write_bytes(whole.read_bytes()[:-20])


@pytest.mark.fault("a table that lists an image: {kind}", "one line for each row that lists it")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "does not exist"),
        ("directory", "is a directory"),
        ("fifo", "is not a regular file"),
        ("dangling", "is a link to a file that does not exist"),
        ("looping", "cannot be read: [Errno 40] Too many levels of symbolic links"),
        ("html", "is not a PNG, JPEG or TIFF that can be read"),
        ("empty", "is empty"),
        ("truncated", "cannot be read: "),
    ],
)
def test_an_image_that_cannot_be_used_is_reported_for_every_row_that_lists_it(
    folder: Path, kind: str, reason: str
) -> None:
    bad = folder / "bad.png"
    make_unusable(bad, kind)
    text = GOOD.replace("b,train,dry,b.png", "b,train,dry,bad.png").replace(
        "c,test,dry,c.png", "c,test,dry,sub/../bad.png"
    )
    third, fourth = problems_of(folder, text)
    assert third.startswith(f"row 3: cfp: {bad}: {reason}")
    assert fourth == third.replace("row 3", "row 4")


def test_a_truncated_array_and_its_sentence(folder: Path) -> None:
    np.save(folder / "a.npy", np.zeros((4, 8, 8), np.uint8))
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-1])
    (problem,) = problems_of(folder, GOOD.replace("c,test,dry,c.png", "c,test,dry,a.npy"))
    assert problem == (f"row 4: cfp: {folder / 'a.npy'}: has 383 bytes, but its header (4, 8, 8) uint8 promises 384")


def test_every_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "same.png").symlink_to("a.png")
    checked = watch_what_is_opened(monkeypatch)
    read(folder, GOOD.replace("b.png", "same.png"))
    assert sorted(path.name for path in checked) == ["a.png", "c.png", "d.png"]


@pytest.mark.fault("ten faults in one table", "all reported at once, in order")
def test_all_faults_are_reported_at_once_in_the_order_of_rows(folder: Path) -> None:
    text = """\
id,split,patient,cfp,label
a,train,p,z.png,x
b,tset,p,a.png,y
a,val,p,/a.png,
d,test
e,test,q,../outside.png,w
"""
    config = DataConfig(modalities=("cfp", "oct"), classes=("x", "y"))
    problems = problems_of(folder, text, config)
    assert problems == [
        "row 1: column 'oct' is missing; the file has id, split, patient, cfp, label",
        f"row 2: cfp: {folder / 'z.png'}: does not exist",
        "row 3: split must be train, val or test, got 'tset'",
        "row 4: label is empty",
        "row 4: id 'a' is already that of row 2",
        "row 4: patient 'p' is in 2 splits: train (row 2), val (row 4)",
        "row 4: cfp: '/a.png' is an absolute path; write it relative to the manifest, or pass --allow-outside",
        "row 5: has 2 cells, but the header has 5",
        "row 6: label must be x or y, got 'w'",
        "row 6: cfp: '../outside.png' leads out of the manifest's folder; this needs --allow-outside",
    ]


def test_the_message_holds_the_file_and_every_problem(folder: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        read(folder, GOOD.replace("test", "tset").replace("b,train", ",train"))
    error = caught.value
    assert str(error).splitlines() == [
        f"{folder / 'manifest.csv'} has 2 problems:",
        "  row 3: id is empty",
        "  row 4: split must be train, val or test, got 'tset'",
    ]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.fault("a manifest: {kind}", "refused")
@pytest.mark.parametrize(("kind", "reason"), [("directory", "is a folder"), ("fifo", "is not a regular file"),
                                              ("missing", "does not exist")])  # fmt: skip
def test_a_manifest_that_is_no_file(folder: Path, kind: str, reason: str) -> None:
    path = folder / "manifest.csv"
    make_unusable(path, kind)
    with pytest.raises(ManifestError) as error:
        read_manifest(path, CONFIG)
    assert error.value.problems == [f"file: {reason}"]


def test_many_faults_are_counted_in_the_message_and_all_in_the_error(folder: Path) -> None:
    rows = [f"x{number},train,dry,z.png,a.png\n" for number in range(30)]
    with pytest.raises(ManifestError) as caught:
        read(folder, GOOD + "".join(rows))
    assert len(caught.value.problems) == len(caught.value.faults) == 30
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (22, "  ... and 10 more; 'ei check --json' lists all")
    with pytest.raises(ManifestError) as caught:
        read(folder, GOOD + "".join(rows[:20]))
    assert len(str(caught.value).splitlines()) == 21


@pytest.mark.fault("a cell that is `{value}`", "refused as a missing value")
@pytest.mark.parametrize("value", ["nan", "NaN", "#N/A", "<NA>", "NULL"])
@pytest.mark.parametrize("column", ["id", "label", "patient", "cfp"])
def test_what_tables_write_for_nothing_is_no_value(folder: Path, value: str, column: str) -> None:
    cells = {"id": "e", "split": "train", "label": "dry", "patient": "q", "cfp": "e.png"} | {column: value}
    text = "id,split,label,patient,cfp\na,train,wet,p,a.png\n" + ",".join(cells.values()) + "\n"
    problems = problems_of(folder, text, DataConfig(modalities=("cfp",)))
    assert problems[0] == f"row 3: {column} is {value!r}, which is how tables write a missing value"


# Copies, lookalikes, and what is only warned of


def warnings_of(folder: Path, text: str, config: DataConfig = CONFIG) -> list[str]:
    return [str(warning) for warning in read(folder, text, config).warnings]


@pytest.mark.fault("the same image bytes in two splits", "refused, with both rows")
def test_a_copy_in_another_split_is_refused_whatever_its_name(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "b.png").read_bytes())
    assert problems_of(folder, GOOD.replace("c.png", "copy.png")) == [
        "row 4: cfp: the same image is that of 2 patients in 2 splits:"
        " 'b.png' (row 3, train, patient 'b'), 'copy.png' (row 4, test, patient 'c')"
    ]


@pytest.mark.fault("the same image bytes under two patients of a split", "warned of")
def test_a_copy_within_a_split_is_warned_of(folder: Path) -> None:
    assert "row 3: oct: the same image is that of 2 patients: " in warnings_of(folder, GOOD)[-1]
    without = GOOD.replace("b.png,a.png", "b.png,e.png") + "d,test,wet,f.png,sub/c.png\n"
    assert warnings_of(folder, without) == []


@pytest.mark.fault("an image saved anew in another split", "warned of")
def test_lookalikes_in_another_split_are_warned_of(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "e.png")
    Image.fromarray(pixels).save(folder / "c.png", compress_level=0)
    found = warnings_of(folder, GOOD.replace("b.png", "e.png"))
    assert "row 4: cfp: 'c.png' (row 4, test, patient 'c') looks like 'e.png' (row 3, train, patient 'b')" in found


def test_a_manifest_to_predict_may_list_an_image_for_several_patients(folder: Path) -> None:
    text = "id,split,cfp\na,train,a.png\nb,test,a.png\n"
    manifest = read(folder, text, DataConfig(modalities=("cfp",)), classes=("x", "y"), labelled=False)
    assert manifest.warnings == ()


@pytest.mark.fault("classes that a split lacks, or that differ in capitals", "warned of")
def test_classes_that_a_split_lacks_and_names_that_nearly_agree(folder: Path) -> None:
    text = GOOD.replace("b.png,a.png", "b.png,e.png").replace("c,test,dry", "c,test,Dry")
    assert warnings_of(folder, text) == [
        "file: has no train row of Dry; they cannot be learned",
        "file: has no test row of dry, wet; metrics leave them out",
        "file: has classes whose names are nearly the same: 'Dry', 'dry'",
    ]
    text = GOOD.replace("b.png,a.png", "b.png,e.png").replace(",dry,", ",1,").replace(",wet,", ",1.0,")
    assert "file: has classes whose names are nearly the same: '1', '1.0'" in warnings_of(folder, text)
    flags = "id,split,acl,meniscus,cfp\na,train,1,0,a.png\nb,val,1,1,b.png\n"
    assert warnings_of(folder, flags, MULTI) == ["file: has no train row of meniscus; they cannot be learned"]


def test_the_intensity_of_each_modality_is_used(folder: Path) -> None:
    np.save(folder / "a.npy", np.full((4, 5), -7, np.int16))
    text = GOOD.replace("a.png,a.png", "a.png,a.npy").replace("b.png,a.png", "b.png,e.png")
    (problem,) = problems_of(folder, text)
    assert problem.startswith(f"row 2: oct: {folder / 'a.npy'}: holds int16")
    config = DataConfig(modalities=("cfp", "oct"), intensity=("type", "-10:10"))
    assert len(read(folder, text, config).rows) == 3
    with pytest.raises(ManifestError, match="cfp: .*holds int16"):
        read(folder, text.replace("a.png,a.npy", "a.npy,a.png"), config)


def test_unchanged_images_are_read_once_and_changed_ones_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in folder.glob("*.png"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    opened = watch_what_is_opened(monkeypatch)
    read(folder, GOOD)
    assert len(opened) == 4
    read(folder, GOOD)
    assert len(opened) == 4
    Image.new("L", (3, 2), 77).save(folder / "b.png")
    read(folder, GOOD)
    assert [path.name for path in opened[4:]] == ["b.png"]
    read_manifest(folder / "manifest.csv", CONFIG, cache=False)
    assert len(opened) == 9


def test_paths_may_lead_out_where_that_is_allowed(folder: Path) -> None:
    config = DataConfig(modalities=("cfp", "oct"), allow_outside=True)
    for name in ("../outside.png", str(folder.parent / "outside.png")):
        row = read(folder, GOOD.replace("c.png", name), config).rows[2]
        assert row.images["cfp"][0].read_bytes() == (folder.parent / "outside.png").read_bytes()
    with pytest.raises(ManifestError, match="is an address"):
        read(folder, GOOD.replace("c.png", "file:///etc/passwd"), config)


@pytest.mark.fault("a table of very many rows, or of as many classes", "the time grows with the rows, not their square")
@pytest.mark.parametrize("classes", ["two", "as many"])
def test_the_time_grows_with_the_rows_and_not_with_their_square(folder: Path, classes: str) -> None:
    seconds = []
    for count in (2_000, 20_000):
        labels = ["xy"[number % 2] if classes == "two" else f"kind {number}" for number in range(count)]
        rows = [f"r{number},train,{label},{'abcdef'[number % 6]}.png" for number, label in enumerate(labels)]
        started = time.process_time()
        manifest = read(folder, "\n".join(["id,split,label,cfp", *rows]), DataConfig(modalities=("cfp",)))
        seconds.append(time.process_time() - started)
        assert len(manifest.rows) == count
    assert seconds[1] < 40 * seconds[0]


@pytest.mark.fault("NaN or infinity in the pixels of {name}", "one line for each row that lists it")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["a.npy", "volume.npy", "a.tif", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize("intensity", ["type", "percentiles", "0:1"])
def test_numbers_that_are_not_finite_are_reported(folder: Path, name: str, value: float, intensity: str) -> None:
    pixels = np.full((3, 8, 9) if name == "volume.npy" else (8, 9), 0.5, np.float32)
    pixels[..., 2, 3] = value
    if name.endswith(".npy"):
        np.save(folder / name, pixels)
    elif name == "a.tif":
        Image.fromarray(pixels).save(folder / name)
    else:
        nibabel = pytest.importorskip("nibabel")
        nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), folder / name)
    config = DataConfig(modalities=("cfp", "oct"), intensity=(intensity,))
    (problem,) = problems_of(folder, GOOD.replace("c,test,dry,c.png", f"c,test,dry,{name}"), config)
    assert problem.startswith(f"row 4: cfp: {folder / name}: has ")
    assert "finite" in problem


# Arguments


@pytest.mark.parametrize(
    ("config", "classes", "message"),
    [
        (DataConfig(), None, "modalities must name at least one column"),
        (DataConfig(modalities=("cfp",), labels=()), None, "labels must name at least one column"),
        (DataConfig(modalities=("id",)), None, "must be columns of their own, got id twice"),
        (DataConfig(modalities=("cfp",), labels=("cfp",)), None, "must be columns of their own, got cfp twice"),
        (MULTI, ("meniscus", "acl"), "classes must be the several label columns"),
        (DataConfig(modalities=("cfp",), labels=("a", "b"), classes=("b", "a")), None, "classes must be the several"),
    ],
)
def test_arguments_that_fit_no_manifest(
    folder: Path, config: DataConfig, classes: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(folder, GOOD, config, classes)
    assert not isinstance(error.value, ManifestError)
