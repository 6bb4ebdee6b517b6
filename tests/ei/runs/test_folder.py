"""What a folder is that is no run, and what to name instead."""

import json
import re
from pathlib import Path

import pytest

from ei.cli import run
from ei.runs.folder import require_run


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """The folder of one, with folds and without."""
    for cell in ("ei/seed-0", "ei/seed-1", "late/fold1/seed-0"):
        (tmp_path / "out" / cell / "stage1/cfp").mkdir(parents=True)
        (tmp_path / "out" / cell / "config.yaml").touch()
    alone = tmp_path / "out/uni+cfp/seed-0"
    alone.mkdir(parents=True)
    (alone / "cell.json").write_text(json.dumps({"stage1_from": "../../ei/seed-0"}))
    return tmp_path / "out"


OTHERS = [
    ("nowhere", "there is no such folder"),
    ("ei/seed-0/config.yaml", "it is a file; name the folder of a run"),
    ("ei/seed-0/stage1", "it is a part of one; name {out}/ei/seed-0"),
    ("ei/seed-0/stage1/cfp", "it is a part of one; name {out}/ei/seed-0"),
    ("uni+cfp/seed-0", "it holds what the first stage of another predicts; name {out}/ei/seed-0"),
    ("uni+cfp", "it holds what the first stages of others predict; name one of them, such as {out}/ei/seed-0"),
    (".", "it is a folder of runs; name one of them, such as {out}/ei/seed-0"),
    ("ei", "it is a folder of runs; name one of them, such as {out}/ei/seed-0"),
    ("late", "it is a folder of runs; name one of them, such as {out}/late/fold1/seed-0"),
]


@pytest.mark.fault("a folder that is no run: {path}", "what it is, and what to name instead")
@pytest.mark.parametrize(("path", "told"), OTHERS)
def test_what_is_no_run(path: str, told: str, comparison: Path) -> None:
    message = f"{comparison / path} is no run: {told.format(out=comparison)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_run(comparison / path)


@pytest.mark.parametrize("damaged", ["", "[]", "{}", '{"stage1_from": null}', '{"stage1_from": 5}'])
def test_a_cell_whose_note_tells_nothing(damaged: str, comparison: Path) -> None:
    (comparison / "uni+cfp/seed-0/cell.json").write_text(damaged)
    with pytest.raises(ValueError, match="is no run: it has no config.yaml$"):
        require_run(comparison / "uni+cfp/seed-0")


@pytest.mark.parametrize("words", ["evaluate {}", "predict {} --manifest m.csv", "report {}"])
def test_every_command_says_so(words: str, comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = comparison / "uni+cfp/seed-0"
    assert run(words.format(path).split()) == 1
    told = capsys.readouterr().err
    assert told.endswith(f"{path} is no run: {OTHERS[4][1].format(out=comparison)}\n")


def test_another_run_to_compare_with_is_one(finished: Path, comparison: Path, capsys) -> None:
    assert run(["report", str(finished), "--against", str(comparison / "ei")]) == 1
    assert "is no run: it is a folder of runs" in capsys.readouterr().err


@pytest.mark.fault("a run's config.yaml that is empty, or not that of a run", "refused, and no weights are asked for")
@pytest.mark.parametrize("text", ["", "data: {modalities: [cfp, oct]}"])
def test_a_configuration_without_classes_is_none_of_a_run(text: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert run(["evaluate", str(tmp_path)]) == 1
    assert "config.yaml: it names no classes, as that of a run does\n" in capsys.readouterr().err
