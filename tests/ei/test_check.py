"""ei check: what it prints, its exit code, and that it is quick to start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ei.check import image_columns
from ei.cli import run


def write(folder: Path, rows: int = 6, **replaced: str) -> Path:
    """A manifest of two classes; ``replaced``: id -> another row in full."""
    lines = ["id,split,label,patient,cfp,note,oct"]
    for number in range(rows):
        split = "train" if number < rows // 2 else "test"
        line = f"r{number},{split},{'xy'[number % 2]},p{number},c{number}.png,seen,o{number}.png"
        for kind in "co":
            pixels = np.random.default_rng([number, ord(kind)]).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{kind}{number}.png")
        lines.append(replaced.get(f"r{number}", line))
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return folder / "m.csv"


def test_a_good_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert run(["check", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"{path} can be used: rows: train 3, test 3; modalities: cfp, oct; classes: x, y\n"
    )


def test_every_fault_has_a_line_and_the_exit_code_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, r1="r1,train,y,p1,c1.png,seen,../o1.png", r4="r4,tset,x,p4,gone.png,seen,o4.png")
    assert run(["check", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "3 problems:",
        "  row 3: oct: '../o1.png' leads out of the manifest's folder; this needs --allow-outside",
        "  row 6: split must be train, val or test, got 'tset'",
        f"  row 6: cfp: {tmp_path / 'gone.png'}: does not exist",
    ]


def test_json_has_all_and_the_screen_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, rows=60)
    for image in tmp_path.glob("c*.png"):
        image.unlink()
    assert run(["check", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("60 problems:", 22, "  ... and 40 more; --json lists all")
    assert run(["check", str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"]
    assert [fault["row"] for fault in told["faults"]] == list(range(2, 62))
    assert told["faults"][0]["text"] == f"cfp: {tmp_path / 'c0.png'}: does not exist"


def test_json_of_a_good_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, r1="r1,train,y,p1,c0.png,seen,o1.png")
    assert run(["check", str(path), "--modalities", "cfp", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["modalities"] == ["cfp"] and told["rows"] == {"train": 3, "test": 3}
    assert [warning["row"] for warning in told["warnings"]] == [3]


def test_missing_modalities_are_counted_where_they_are_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps = {"r1": "r1,train,y,p1,c1.png,seen,", "r2": "r2,train,x,p2,c2.png,seen,", "r4": "r4,test,x,p4,c4.png,seen,"}
    path = write(tmp_path, **gaps)
    assert run(["check", str(path)]) == 1
    assert [line.partition(";")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        f"  row {row}: oct is empty" for row in (3, 4, 6)
    ]
    assert run(["check", str(path), "--allow-missing"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{path} can be used: rows: train 3, test 3; modalities: cfp, oct; classes: x, y",
        "rows without oct: 2 of 3 train, 1 of 3 test",
    ]
    assert run(["check", str(path), "--allow-missing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == {"oct": {"train": 2, "test": 1}}


def test_training_refuses_what_the_check_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, r5="r5,test,y,p5,c0.png,seen,o5.png")
    assert run(["check", str(path)]) == 1
    problem = capsys.readouterr().out.splitlines()[1]
    assert "the same image is that of 2 patients in 2 splits" in problem
    words = ["train", "--manifest", str(path), "--modalities", "cfp,oct", "--backbone", "tiny", "--image-size", "8"]
    assert run([*words, "--out", str(tmp_path / "run")]) == 1
    assert problem in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "run").exists()


def test_a_manifest_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    path.write_text("id,cfp\na,c0.png\nb,c0.png\n")
    assert run(["check", str(path), "--unlabelled"]) == 0
    assert capsys.readouterr().out == f"{path} can be used: rows: 2; modalities: cfp\n"
    assert run(["check", str(path)]) == 1


def test_the_columns_of_a_configuration(tmp_path: Path, study_config, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    study_config(path).save(tmp_path / "config.yaml")
    path.write_text(path.read_text().replace("oct", "OCT"))
    assert run(["check", str(path), "--config", str(tmp_path / "config.yaml")]) == 1
    assert "column 'oct' is missing" in capsys.readouterr().out


def test_paths_outside_may_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path = write(tmp_path)
    moved = path.rename(tmp_path / "set/m.csv")
    moved.write_text(moved.read_text().replace(",c", ",../c").replace(",o", f",{tmp_path}/o").replace("../cfp", "cfp"))
    moved.write_text(moved.read_text().replace(f",{tmp_path}/oct", ",oct"))
    assert run(["check", str(moved)]) == 1
    assert run(["check", str(moved), "--allow-outside"]) == 0


def test_which_columns_name_images(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text('id,a,label,b ,c,split\nx.png,,l.png,"1.nii.gz;2.nii.gz",no,t\ny,A.DCM,z,2,c.png,t\n')
    assert image_columns(path, besides=("label",)) == ("b", "a")
    path.write_text("id,a,b\nx,1.webp,1.png\n")
    assert image_columns(path, besides=()) == ("a", "b")  # that a cannot be read is told
    path.write_text("id,report,b\nx,1.pdf,1.png\n")
    assert image_columns(path, besides=()) == ("b",)
    path.write_text("id,label\na,b\n")
    with pytest.raises(ValueError, match="no column of .* names images; name them with --modalities"):
        image_columns(path, besides=())


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "m.csv")
    for flags in ([], ["--modalities", "cfp"]):
        assert run(["check", path, *flags]) == 1
        assert capsys.readouterr().out == f"the manifest '{path}' does not exist\n"
    assert run(["check", path, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"] == [{"row": 0, "text": "does not exist"}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "the manifest '{path}' is a folder"),
        ("", "the manifest '{path}' has no rows"),
        ("id,split,label,cfp\n", "the manifest '{path}' has no rows"),
        (
            "id;split;label;cfp;note\na;train;x;c0.png;seen\n",
            "1 problem:\n  row 1: columns are separated by semicolons; save the file with commas between columns",
        ),
    ],
)
def test_a_file_that_is_no_table_with_commas(
    text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.csv"
    path.mkdir() if text is None else path.write_text(text)
    assert run(["check", str(path)]) == 1
    assert capsys.readouterr().out == told.format(path=path) + "\n"


def test_the_check_needs_no_torch(tmp_path: Path) -> None:
    words = ["check", str(write(tmp_path))]
    code = f"import sys, ei.cli; assert ei.cli.run({words}) == 0; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
