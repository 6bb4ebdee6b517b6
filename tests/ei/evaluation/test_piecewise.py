"""Predictions are the same bytes however the work was shared or broken off, and hold every row once."""

import csv
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import ei.evaluation.piecewise as prediction
from ei import predict
from ei.config import Config
from ei.data.manifest import Row
from ei.evaluation.piecewise import Pieces
from ei.evaluation.shard import Shard
from ei.runs.checkpoint import read_checkpoint, write_checkpoint

ROWS, PIECES = 63, 11


class Stop(Exception):
    """Stands for a kill: nothing is caught, nothing is saved."""


def write_rows(study: Path) -> Path:
    """Many rows of the study's few images; ids as a spreadsheet would run them are among them."""
    lines = ["id,cfp,oct"]
    for number in range(ROWS):
        name = f"=r{number}" if number % 10 == 0 else f"r{number}"
        lines.append(f"{name},train{number % 12}_cfp.png,test{number % 9}_oct.png")
    (study / "new.csv").write_text("\n".join(lines))
    return study / "new.csv"


@pytest.fixture(scope="module")
def lasting_rows(finished) -> Path:
    return write_rows(finished.parent / "study")


@pytest.fixture(scope="module")
def whole(finished, lasting_rows, tmp_path_factory) -> bytes:
    """The table, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "out.csv"
    assert predict(finished, lasting_rows, out)
    assert not out.with_name("out.csv.parts").exists()
    return out.read_bytes()


@pytest.fixture
def predicted(monkeypatch) -> list[tuple[str, ...]]:
    """The ids of every batch that the model was given."""
    seen: list[tuple[str, ...]] = []
    batches = prediction.predict_batches

    def watched(model, rows, config, **options):
        start = 0
        for batch in batches(model, rows, config, **options):
            seen.append(tuple(row.id for row in rows[start : start + len(batch.logits)]))
            start += len(batch.logits)
            yield batch

    monkeypatch.setattr(prediction, "predict_batches", watched)
    return seen


def read_table(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_predict_without_labels(run, tmp_path):
    source = run.parent / "study"
    lines = (source / "manifest.csv").read_text().splitlines()
    kept = [line.split(",") for line in lines if line.startswith(("id", "test"))]
    (source / "new.csv").write_text("\n".join(",".join([row[0], *row[4:]]) for row in kept))
    predict(run, source / "new.csv", tmp_path / "deep/out.csv")
    new, old = read_table(tmp_path / "deep/out.csv"), read_table(run / "predictions.csv")[6:]
    assert [row["label"] for row in new] == [""] * 9
    for one, other in zip(new, old, strict=True):
        assert one["fused:dark"] == other["fused:dark"] and one["weight:oct"] == other["weight:oct"]


@pytest.mark.fault("formulas in ids and patients", "text in the predictions")
def test_ids_that_a_spreadsheet_would_run_are_text(run, tmp_path):
    source = run.parent / "study"
    text = (source / "manifest.csv").read_text()
    (source / "new.csv").write_text(text.replace("test0,test0", '"=HYPERLINK(""x"")",@p').replace("test1,", "-1.5,"))
    predict(run, source / "new.csv", tmp_path / "out.csv")
    new, old = read_table(tmp_path / "out.csv")[18:], read_table(run / "predictions.csv")[6:]
    assert [row["id"] for row in new[:3]] == ['\'=HYPERLINK("x")', "-1.5", "test2"]
    assert new[0]["patient"] == "'@p"
    numbers = [name for name in new[0] if ":" in name]
    assert [[row[name] for name in numbers] for row in new] == [[row[name] for name in numbers] for row in old]


def test_predictions_never_replace_their_manifest(run):
    manifest = run.parent / "study/manifest.csv"
    before = manifest.read_bytes()
    for out in (manifest, manifest.parent / "../study/manifest.csv", run):
        with pytest.raises(ValueError, match="out must be a file of its own"):
            predict(run, manifest, out)
    assert manifest.read_bytes() == before


@pytest.mark.parametrize("name", ["other.csv", "image.png"])
def test_predictions_never_replace_a_file_of_another_kind(run, tmp_path, name):
    contents = {"other.csv": b"id,patient,split,label,cfp,oct\n", "image.png": b"\x89PNG\r\n\x1a\n\0,\xff"}
    out = tmp_path / name
    out.write_bytes(contents[name])
    with pytest.raises(
        ValueError, match=f"{name} is there and holds no predictions; remove it or choose another --out"
    ):
        predict(run, run.parent / "study/manifest.csv", out)
    assert out.read_bytes() == contents[name] and not (tmp_path / f"{name}.parts").exists()


def test_predictions_replace_earlier_ones(run, tmp_path):
    out = tmp_path / "out.csv"
    out.touch()
    for _ in range(2):
        assert predict(run, run.parent / "study/manifest.csv", out)
    assert len(read_table(out)) == len(read_table(run.parent / "study/manifest.csv"))


# Pieces


@pytest.mark.parametrize("batch_size", [1, 6, 8, 64])
@pytest.mark.parametrize("count", [1, 5, 6, 63, 1000, 1001, 8001, 20_003])
def test_every_row_is_in_one_piece_and_every_piece_is_of_whole_batches(count, batch_size):
    rows = [Row(number, str(number), "", "", None, {}) for number in range(count)]
    pieces = Pieces(Path("out.csv"), rows, batch_size, {})
    assert pieces.count <= 1000
    assert [row for number in range(pieces.count) for row in pieces.rows_of(number)] == rows
    assert all(len(pieces.rows_of(number)) % batch_size == 0 for number in range(pieces.count - 1))


@pytest.mark.parametrize("shards", [1, 3, 12])
def test_shards_give_the_same_bytes(finished, lasting_rows, tmp_path, whole, capsys, predicted, shards):
    """Of a row even the last bits, because its batch is the same."""
    order = [*range(2, shards + 1), 1]
    done = [predict(finished, lasting_rows, tmp_path / "out.csv", f"{number}/{shards}") for number in order]
    assert done[-1] and (tmp_path / "out.csv").read_bytes() == whole
    waiting = [number for number, complete in zip(order, done, strict=True) if not complete]
    assert waiting == order[: len(waiting)]
    if 1 < shards <= PIECES:
        assert (
            f"shard 2/{shards} is done; still to come, of {shards}: {', '.join(map(str, sorted({*order} - {2})))}"
            in (capsys.readouterr().out)
        )
    assert sorted(predicted) == sorted({tuple(batch) for batch in predicted}) and len(predicted) == PIECES
    before = len(predicted)
    assert predict(
        finished, lasting_rows, tmp_path / "out.csv", f"1/{shards}"
    )  # as a queue may do that starts it again
    assert len(predicted) == before and (tmp_path / "out.csv").read_bytes() == whole


def test_without_a_shard_what_shards_have_left_is_finished(finished, lasting_rows, tmp_path, whole, predicted):
    assert not predict(finished, lasting_rows, tmp_path / "out.csv", "2/3")
    there = len(predicted)
    assert predict(finished, lasting_rows, tmp_path / "out.csv")
    assert 0 < there < len(predicted) == PIECES
    assert (tmp_path / "out.csv").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize("text", ["2", "0/3", "4/3", "1/0", "a/b", "1/2/3", "-1/3", "1 / 2"])
def test_what_is_no_shard(finished, text):
    with pytest.raises(ValueError, match="shard must be I/N with I from 1 to N, such as 2/8, got"):
        predict(finished, "rows.csv", "out.csv", text)
    assert Shard.parse("3/3") == Shard(3, 3)


def test_others_files_in_the_folder_stay(finished, lasting_rows, tmp_path):
    (tmp_path / "out.csv.parts").mkdir()
    (tmp_path / "out.csv.parts/mine.txt").write_text("kept")
    assert predict(finished, lasting_rows, tmp_path / "out.csv")
    assert [path.name for path in (tmp_path / "out.csv.parts").iterdir()] == ["mine.txt"]


# Faults


@pytest.mark.fault("ei predict killed before or after anything is written", "the same bytes, nothing predicted twice")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("shards", [1, 3])
def test_killed_at_every_write(finished, lasting_rows, tmp_path, whole, monkeypatch, predicted, when, shards):
    monkeypatch.setattr(prediction, "_MOST_PIECES", 4)
    write, written = prediction.write_atomically, []

    def mortal(path, payload):
        if when == "after" or path in written:
            write(path, payload)
        if path not in written:
            written.append(path)
            raise Stop

    monkeypatch.setattr(prediction, "write_atomically", mortal)
    kills = 0
    for number in range(1, shards + 1):
        while True:
            try:
                predict(finished, lasting_rows, tmp_path / "out.csv", f"{number}/{shards}" if shards > 1 else "")
                break
            except Stop:
                kills += 1
    assert kills == 4 + 1
    assert (tmp_path / "out.csv").read_bytes() == whole
    if when == "after":
        assert len(predicted) == len(set(predicted)) == PIECES


def _predict_in_another_process(run: Path, manifest: Path, out: Path, shard: str) -> None:
    torch.set_num_threads(1)
    write = prediction.write_atomically

    def slow(path, payload):
        time.sleep(0.05)
        write(path, payload)

    prediction.write_atomically = slow
    predict(run, manifest, out, shard)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ei.evaluation.piecewise", "ei.models", "torch"])
    return context


@pytest.fixture
def one_thread():
    """As in the other processes, because last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.fault("ei predict killed by kill -9 in the middle", "the same command goes on; each row once, same bytes")
@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
@pytest.mark.parametrize("shard", ["", "2/2"])
def test_killed_for_good(finished, lasting_rows, tmp_path, processes, predicted, one_thread, shard):
    assert predict(finished, lasting_rows, tmp_path / "whole.csv")
    predicted.clear()
    out, parts = tmp_path / "out.csv", tmp_path / "out.csv.parts"
    child = processes.Process(target=_predict_in_another_process, args=(finished, lasting_rows, out, shard))
    child.start()
    while len(list(parts.glob("piece-*"))) < 3:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not out.exists()
    if shard:
        assert not predict(finished, lasting_rows, out, shard)
    assert predict(finished, lasting_rows, out, "1/2" if shard else "")
    assert 0 < len(predicted) <= PIECES - 3
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(read_table(out)) == len({row["id"] for row in read_table(out)}) == ROWS


@pytest.mark.fault("two shards of ei predict at once", "each row once")
def test_two_shards_at_once(finished, lasting_rows, tmp_path, processes, one_thread):
    assert predict(finished, lasting_rows, tmp_path / "whole.csv")
    children = [
        processes.Process(
            target=_predict_in_another_process, args=(finished, lasting_rows, tmp_path / "out.csv", f"{number}/2")
        )
        for number in (1, 2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte gone": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "bit flipped": flip,
    "tail zeroed": lambda path: path.write_bytes(path.read_bytes()[:-16] + bytes(16)),
    "another piece": lambda path: shutil.copy(path.with_name("piece-0001"), path),
}


@pytest.fixture
def begun(finished, lasting_rows, tmp_path):
    """Every second piece is there."""
    assert not predict(finished, lasting_rows, tmp_path / "out.csv", "1/2")
    return tmp_path / "out.csv"


@pytest.mark.fault(
    "a finished piece of ei predict empty, cut, bit-flipped, its tail zeroed, or another's",
    "named, predicted again; the same bytes",
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_predicted_again(finished, lasting_rows, begun, whole, capsys, predicted, damage):
    capsys.readouterr()
    DAMAGES[damage](begun.with_name("out.csv.parts") / "piece-0003")
    assert predict(finished, lasting_rows, begun)
    assert "out.csv.parts: piece-0003 cannot be used: " in capsys.readouterr().out.replace("\n", "")
    assert len(predicted) == 5 + 1
    assert begun.read_bytes() == whole


@pytest.mark.fault("ei predict goes on with another manifest, image, model or setting", "said, nothing old is used")
@pytest.mark.parametrize("other", ["manifest", "state of the images", "trained model", "configuration"])
def test_pieces_of_something_else_are_not_used(run, capsys, tmp_path, predicted, other):
    rows, out = write_rows(run.parent / "study"), tmp_path / "out.csv"
    assert not predict(run, rows, out, "1/2")
    predicted.clear()
    match other:
        case "manifest":
            rows.write_text(rows.read_text().replace("r1,", "r1b,"))
        case "state of the images":
            Image.new("L", (8, 8), 99).save(run.parent / "study/train0_cfp.png")
        case "trained model":
            best = read_checkpoint(run / "stage2/best.safetensors")
            changed = {name: tensor + 0.01 for name, tensor in best.parameters.items()}
            write_checkpoint(run / "stage2/best.safetensors", changed, best.notes)
        case "configuration":
            config = Config.load(run / "config.yaml")
            replace(config, data=replace(config.data, mean=(0.5, 0.5, 0.5))).save(run / "config.yaml")
    capsys.readouterr()
    assert predict(run, rows, out)
    said = capsys.readouterr().out
    assert f"piece-0001, piece-0003, piece-0005 and 3 more cannot be used: made with another {other}" in said
    assert len(predicted) == PIECES
    assert predict(run, rows, tmp_path / "fresh.csv")
    assert out.read_bytes() == (tmp_path / "fresh.csv").read_bytes()


def test_what_changes_nothing_but_the_speed_or_the_place_keeps_the_pieces(run, tmp_path, predicted):
    rows, out = write_rows(run.parent / "study"), tmp_path / "out.csv"
    assert not predict(run, rows, out, "1/2")
    config = Config.load(run / "config.yaml")
    moved = replace(config.data, manifest="elsewhere.csv")
    replace(config, data=moved, train=replace(config.train, workers=1)).save(run / "config.yaml")
    assert predict(run, rows, out)
    assert len(predicted) == PIECES


def test_pieces_from_another_place_are_told(finished, lasting_rows, begun, monkeypatch, capsys):
    where = prediction.environment
    monkeypatch.setattr(prediction, "environment", lambda device: {**where(device), "device": "another"})
    assert predict(finished, lasting_rows, begun)
    assert "pieces were predicted with several device (another, cpu); last digits may differ" in capsys.readouterr().out


@pytest.mark.fault("a full disk while ei predict writes", "an error; what was there stays, it goes on from there")
def test_a_full_disk_leaves_the_pieces_before(finished, lasting_rows, begun, whole, monkeypatch, predicted):
    there = sorted(begun.with_name("out.csv.parts").iterdir())
    with monkeypatch.context() as patched:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            predict(finished, lasting_rows, begun)
    assert sorted(begun.with_name("out.csv.parts").iterdir()) == there
    assert predict(finished, lasting_rows, begun)
    assert begun.read_bytes() == whole


@pytest.mark.parametrize("how", ["twice", "missing", "exchanged"])
def test_no_table_lacks_or_repeats_a_row(finished, lasting_rows, begun, monkeypatch, how):
    """Whatever may be wrong with pieces that are whole."""
    read = Pieces.read

    def wrong(self, numbers):
        found = read(self, numbers)
        if len(found) == PIECES:
            second = {"twice": found[0], "missing": replace(found[1], text=b""), "exchanged": found[2]}[how]
            found[1], found[2] = second, found[1] if how == "exchanged" else found[2]
        return found

    monkeypatch.setattr(Pieces, "read", wrong)
    with pytest.raises(ValueError, match="does not hold each row of the manifest once; delete it and predict again"):
        predict(finished, lasting_rows, begun)
    assert not begun.exists()


def test_pieces_that_another_process_takes_away(finished, lasting_rows, begun, monkeypatch):
    make = prediction._make

    def robbed(pieces, *rest):
        make(pieces, *rest)
        (pieces.folder / "piece-0001").unlink()

    monkeypatch.setattr(prediction, "_make", robbed)
    with pytest.raises(ValueError, match="does another process predict to"):
        predict(finished, lasting_rows, begun)
