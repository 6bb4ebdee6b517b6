"""What was written is read back, by TensorBoard's own reader too."""

import json

import pytest

from ei.runs.folder import StageFolder
from ei.runs.history import History, require_tensorboard
from ei.training import train


def record(epoch: int, total: float) -> dict:
    return {"epoch": epoch, "step": 3 * epoch, "loss": {"total": total} if epoch else None, "val": {"mAP": 0.5}}


def events(folder, name: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder))
    read.Reload()
    return [(event.step, pytest.approx(event.value)) for event in read.Scalars(name)]


def test_lines_after_the_snapshot_are_dropped_in_both(tmp_path) -> None:
    folder = StageFolder(tmp_path / "stage2")
    first = History(folder, tensorboard=True, records=0)
    for epoch, total in enumerate((0.0, 3.0, 2.0)):
        first.add(record(epoch, total))
    first.close()
    again = History(folder, tensorboard=True, records=2)
    again.add(record(2, 1.0))
    again.close()
    lines = [json.loads(line) for line in folder.history.read_text().splitlines()]
    assert lines == [record(0, 0.0), record(1, 3.0), record(2, 1.0)]
    assert events(folder.tensorboard, "loss/total") == [(1, 3.0), (2, 1.0)]
    assert events(folder.tensorboard, "val/mAP") == [(0, 0.5), (1, 0.5), (2, 0.5)]


def test_without_tensorboard_there_are_no_events(tmp_path) -> None:
    folder = StageFolder(tmp_path / "stage2")
    history = History(folder, tensorboard=False, records=0)
    history.add(record(0, 0.0))
    history.close()
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]


def test_a_run_writes_what_its_history_says(manifest, tmp_path, study_config) -> None:
    run = train(study_config(manifest, stages="2", tensorboard=True), tmp_path / "run")
    lines = [json.loads(line) for line in (run / "stage2/metrics.jsonl").read_text().splitlines()]
    assert events(run / "stage2/tensorboard", "loss/total") == [(1, lines[1]["loss"]["total"])]
    assert events(run / "stage2/tensorboard", "images_per_second") == [(1, lines[1]["images_per_second"])]


def test_a_missing_package_is_said_before_training(monkeypatch) -> None:
    monkeypatch.setattr("ei.runs.history.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        require_tensorboard()
