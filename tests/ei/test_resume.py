"""A run that was stopped, at any point and in any way, goes on to the weights of one that was not."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ei.training as training
from ei.cli import run as command_line
from ei.config import Config, ModelConfig
from ei.data.sample import Batch
from ei.interrupts import Interrupted
from ei.runs.checkpoint import read_checkpoint
from ei.runs.loading import load
from ei.runs.snapshots import newest_snapshot
from ei.training import train

STAGES = ("stage1/cfp", "stage1/oct", "stage2")


@pytest.fixture(scope="module")
def config(lasting_manifest, study_config) -> Config:
    """With dropout, so that the state of the generators matters; 2 epochs of 3 steps per stage."""
    config = study_config(lasting_manifest, epochs=2, batch_size=5)
    return replace(config, model=replace(config.model, ranks=(1, 2), dropout=0.2))


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """Only read."""
    return train(config, tmp_path_factory.mktemp("resume") / "unbroken")


class Stop(Exception):
    """Stands for a kill: nothing is caught, nothing is saved."""


def assert_same(one: Path, other: Path, stages: Sequence[str] = STAGES) -> None:
    for stage in stages:
        first, second = (read_checkpoint(run / stage / "best.safetensors") for run in (one, other))
        assert first.notes == second.notes
        assert first.parameters.keys() == second.parameters.keys()
        for name, tensor in first.parameters.items():
            assert torch.equal(tensor, second.parameters[name]), (stage, name)
        last, last_other = (newest_snapshot(run / stage / "snapshots") for run in (one, other))
        for group, tensors in last.tensors.items():
            assert all(torch.equal(tensor, last_other.tensors[group][name]) for name, tensor in tensors.items()), group
        histories = [(run / stage / "metrics.jsonl").read_text().splitlines() for run in (one, other)]
        lines = [[json.loads(line) for line in history] for history in histories]
        for ours, theirs in zip(*lines, strict=True):
            for timing in ("seconds", "images_per_second", "memory_gib"):
                del ours[timing], theirs[timing]
            assert ours == theirs
    tables = [(run / "predictions.csv").read_bytes() for run in (one, other)]
    assert tables[0] == tables[1]


def train_killed(monkeypatch, config, run, at) -> tuple[int, int]:
    """Train as often as it takes, killed after the steps of which ``at(number)`` is true: how many kills and steps."""
    step, done, kills = training.Step.__call__, 0, 0

    def mortal(*args):
        nonlocal done
        values = step(*args)
        done += 1
        if at(done):
            raise Stop
        return values

    with monkeypatch.context() as patched:
        patched.setattr(training.Step, "__call__", mortal)
        while True:
            try:
                train(config, run)
                return kills, done
            except Stop:
                kills += 1


def every_fourth(number: int) -> bool:
    return number % 4 == 0


@pytest.mark.fault("killed after a step", "the same weights, bit for bit")
@pytest.mark.parametrize("save_minutes", [0.0, 10.0], ids=["saved at every step", "saved at every epoch"])
def test_killed_at_any_step(config, tmp_path, unbroken, monkeypatch, save_minutes):
    """Killed after every fourth step, eighteen in all, until it gets to the end."""
    config = replace(config, train=replace(config.train, save_minutes=save_minutes))
    kills, steps = train_killed(monkeypatch, config, tmp_path / "broken", every_fourth)
    assert kills > 3
    assert steps > 18  # some were taken twice
    assert_same(unbroken, tmp_path / "broken")


@pytest.mark.fault("killed after a step", "the same weights, bit for bit")
def test_killed_with_auxiliary_vits_of_their_own(config, manifest, tmp_path, monkeypatch):
    """In any of their first stages, or in the second; without rows to evaluate on."""
    lines = [line for line in manifest.read_text().splitlines() if ",val," not in line and ",test," not in line]
    manifest.write_text("\n".join(lines))
    config = replace(
        config,
        data=replace(config.data, manifest=str(manifest)),
        model=replace(config.model, aux_backbone="tiny"),
        train=replace(config.train, epochs=1),
    )
    unbroken = train(config, tmp_path / "unbroken")
    kills, _ = train_killed(monkeypatch, config, tmp_path / "broken", every_fourth)
    assert kills >= 4
    for stage in (*STAGES, "stage1-auxiliary/cfp", "stage1-auxiliary/oct"):
        ours, theirs = (read_checkpoint(run / stage / "best.safetensors") for run in (tmp_path / "broken", unbroken))
        assert ours.notes == theirs.notes
        assert all(torch.equal(ours.parameters[name], tensor) for name, tensor in theirs.parameters.items())


@pytest.mark.fault("killed after a step", "the same weights, bit for bit")
@pytest.mark.parametrize(
    ("adapter", "fusion"),
    [
        ("bitfit", "ei"),
        ("vpt", "ei"),
        ("rlrr", "ei"),
        ("losa", "late"),
        ("latelora", "ei"),
        ("peft:ia3", "ei"),
    ],
)
def test_killed_with_any_adapter(write_study, study_config, tmp_path, monkeypatch, adapter, fusion):
    """In the second stage, which takes over the first; and what is loaded is the model that was trained."""
    if adapter.startswith("peft:"):
        pytest.importorskip("peft")
    manifest = write_study(tmp_path / "study", {"train": 12})
    config = replace(study_config(manifest), model=ModelConfig(backbone="tiny", adapter=adapter, fusion=fusion))
    trained = []
    run = training.Loop.run

    def remember(self):
        run(self)
        trained.append(self.model)

    monkeypatch.setattr(training.Loop, "run", remember)
    unbroken = train(config, tmp_path / "unbroken")
    modalities = config.data.modalities
    batch = Batch(
        {name: torch.randn(4, 1, 3, 8, 8) for name in modalities},
        present={name: torch.ones(4, 1, dtype=torch.bool) for name in modalities},
    )
    assert torch.equal(load(unbroken)[0](batch).logits, trained[-1].eval()(batch).logits)

    kills, _ = train_killed(monkeypatch, config, tmp_path / "broken", lambda number: number == 5)
    assert kills == 1
    for stage in STAGES:
        ours, theirs = (read_checkpoint(run / stage / "best.safetensors") for run in (unbroken, tmp_path / "broken"))
        assert ours.parameters.keys() == theirs.parameters.keys()
        assert all(torch.equal(tensor, theirs.parameters[name]) for name, tensor in ours.parameters.items())


@pytest.mark.fault("killed while validating", "the same weights, bit for bit")
def test_killed_while_validating(config, tmp_path, unbroken, monkeypatch):
    """When all steps of the epoch are done and saved."""
    validate, seen = training.Loop.validate, set()

    def mortal(self, rows):
        if (where := (self.title, self.at.epoch, len(rows))) not in seen:
            seen.add(where)
            raise Stop
        return validate(self, rows)

    monkeypatch.setattr(training.Loop, "validate", mortal)
    config = replace(config, train=replace(config.train, save_minutes=0.0))
    for _ in range(20):
        try:
            train(config, tmp_path / "broken")
            break
        except Stop:
            pass
    assert len(seen) == 3 * 3 + 2  # each epoch of each stage, and the training rows for the gate prior
    assert_same(unbroken, tmp_path / "broken")


@pytest.mark.fault("killed before or after a file is written", "the same weights, bit for bit")
@pytest.mark.parametrize("where", ["write_checkpoint", "write_snapshot", "write_atomically", "evaluate"])
def test_killed_before_or_after_anything_is_written(config, tmp_path, unbroken, monkeypatch, where):
    write, draw = getattr(training, where), random.Random(1)

    def mortal(*args):
        fate = draw.random()
        if fate < 0.2:
            raise Stop
        write(*args)
        if fate < 0.4:
            raise Stop

    monkeypatch.setattr(training, where, mortal)
    kills = 0
    for _ in range(60):
        try:
            train(config, tmp_path / "broken")
            break
        except Stop:
            kills += 1
    else:
        pytest.fail("it never came to an end")
    assert kills
    assert_same(unbroken, tmp_path / "broken")


@pytest.mark.fault("Ctrl-C, SIGTERM", "saved first, no step twice; the same weights, bit for bit")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_the_same_call_goes_on(config, tmp_path, unbroken, monkeypatch, number):
    step, done = training.Step.__call__, []

    def signalled(*args):
        done.append(True)
        if len(done) == 8:  # the second step of the second epoch or so
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(training.Step, "__call__", signalled)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        train(config, tmp_path / "broken")
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert len(done) == 8
    train(config, tmp_path / "broken")
    assert len(done) == 18, "a step that was saved was taken again"
    assert_same(unbroken, tmp_path / "broken")


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["as usual", "ignored"])
def ctrl_c(request):
    """What Ctrl-C does before training begins; what a shell starts in the background has it ignored."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


@pytest.mark.fault("a second Ctrl-C", "stops at once")
def test_a_second_signal_stops_at_once(config, tmp_path, monkeypatch, ctrl_c):
    def signalled(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # two that come at once are one to the operating system
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("it went on")

    monkeypatch.setattr(training.Step, "__call__", signalled)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is ctrl_c


def test_a_run_that_another_process_begins_meanwhile_is_not_overwritten(config, tmp_path, monkeypatch):
    load = training.load_trunk

    def slow(given):
        other = replace(given, train=replace(given.train, epochs=7))
        (tmp_path / "run").mkdir()
        other.save(tmp_path / "run/config.yaml")
        return load(given)

    monkeypatch.setattr(training, "load_trunk", slow)
    with pytest.raises(ValueError, match=r"begun with other settings: train epochs \(was 7, is 2\)"):
        train(config, tmp_path / "run")
    assert "epochs: 7" in (tmp_path / "run/config.yaml").read_text()


def test_the_command_line_says_how_to_go_on(config, tmp_path, monkeypatch, capsys):
    step = training.Step.__call__

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(training.Step, "__call__", signalled)
    config.save(tmp_path / "config.yaml")
    words = ["train", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    assert command_line(words) == 143
    assert "stopped by SIGTERM and saved; the same command goes on from there" in capsys.readouterr().err


def test_a_finished_run_is_left_alone(config, unbroken, capsys):
    files = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    train(config, unbroken)
    assert "is finished, there is nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == files


@pytest.fixture(scope="module")
def lasting_stopped(config, tmp_path_factory):
    """A run that was killed in stage 2, with two snapshots there; only read."""
    step, done, run = training.Step.__call__, [], tmp_path_factory.mktemp("resume") / "stopped"

    def mortal(*args):
        done.append(True)
        if len(done) > 17:
            raise Stop
        return step(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training.Step, "__call__", mortal)
        with pytest.raises(Stop):
            train(replace(config, train=replace(config.train, save_minutes=0.0)), run)
    return run


@pytest.fixture
def stopped(lasting_stopped, tmp_path):
    return shutil.copytree(lasting_stopped, tmp_path / "stopped")


def newest(run: Path) -> Path:
    return max((run / "stage2/snapshots").glob("step-*"))


def cut(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size + length) if length < 0 else length)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_tail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-16] + bytes(16))


DAMAGES = {
    "empty": lambda path: cut(path, 0),
    "first bytes only": lambda path: cut(path, 7),
    "half": lambda path: cut(path, path.stat().st_size // 2),
    "last byte gone": lambda path: cut(path, -1),
    "bit flipped": flip,
    "tail zeroed": zero_tail,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.fault(
    "a snapshot's file empty, cut, bit-flipped, its tail zeroed, or missing", "named, the one before it is used"
)
@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "notes.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_named_and_the_one_before_it_is_used(stopped, capsys, name, damage):
    before, path = sorted((stopped / "stage2/snapshots").glob("step-*"))
    DAMAGES[damage](path / name)
    found = newest_snapshot(stopped / "stage2/snapshots")
    assert f"step-{found.step:09d}" == before.name
    assert f"{path} is damaged" in capsys.readouterr().out


@pytest.mark.fault("two snapshots swapped", "both named, neither used")
def test_snapshots_that_were_swapped_are_noticed(stopped, capsys):
    before, path = sorted((stopped / "stage2/snapshots").glob("step-*"))
    path.rename(path.with_name("other"))
    before.rename(path)
    path.with_name("other").rename(before)
    assert newest_snapshot(stopped / "stage2/snapshots") is None
    assert capsys.readouterr().out.count("is damaged") == 2


@pytest.mark.fault("files of two snapshots swapped", "the older one is used")
def test_files_of_two_snapshots_that_were_swapped_are_noticed(stopped):
    before, path = sorted((stopped / "stage2/snapshots").glob("step-*"))
    shutil.copy(before / "parameters.safetensors", path / "parameters.safetensors")
    assert f"step-{newest_snapshot(stopped / 'stage2/snapshots').step:09d}" == before.name


@pytest.mark.fault("newest snapshot damaged, litter of a kill", "the same weights, bit for bit")
def test_a_run_goes_on_from_the_snapshot_before_a_damaged_one(config, stopped, unbroken):
    flip(newest(stopped) / "optimizer.safetensors")
    (stopped / "stage2/snapshots/.tmp-99-1").mkdir()  # what a kill leaves behind
    train(config, stopped)
    assert_same(unbroken, stopped)
    assert not list((stopped / "stage2/snapshots").glob(".tmp*"))


@contextmanager
def renamed_row(manifest: Path) -> Iterator[None]:
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b"train3,", b"trainee3,", 1))
    try:
        yield
    finally:
        manifest.write_bytes(content)


@pytest.mark.fault("other settings", "refused by name")
def test_other_settings_are_refused_and_named(config, stopped):
    with pytest.raises(ValueError, match=r"begun with other settings: train lr \(was 0.003, is 0.1\)"):
        train(replace(config, train=replace(config.train, lr=0.1)), stopped)
    train(replace(config, train=replace(config.train, workers=1)), stopped)  # changes nothing but the speed


@pytest.mark.fault("another manifest", "refused")
def test_another_manifest_is_refused(config, stopped, lasting_manifest):
    with renamed_row(lasting_manifest), pytest.raises(ValueError, match="is not what it was when .* was begun"):
        train(config, stopped)


@pytest.mark.fault("another image under the same name", "refused")
def test_another_image_is_refused(config, stopped, lasting_manifest):
    path = lasting_manifest.parent / "train3_oct.png"
    content = path.read_bytes()
    try:
        path.write_bytes((lasting_manifest.parent / "train3_cfp.png").read_bytes())
        with pytest.raises(ValueError, match="an image of .* is not what it was when .* was begun"):
            train(config, stopped)
    finally:
        path.write_bytes(content)


@pytest.mark.fault("other frozen weights", "refused")
def test_other_frozen_weights_are_refused(config, stopped, monkeypatch):
    load = training.load_trunk

    def other(config):
        trunk = load(config)
        with torch.no_grad():
            next(trunk.parameters()).add_(1.0)
        return trunk

    monkeypatch.setattr(training, "load_trunk", other)
    with pytest.raises(ValueError, match="frozen weights of backbone 'tiny' are not those"):
        train(config, stopped)


@pytest.mark.fault("another manifest after stage 1", "refused")
def test_another_manifest_is_refused_between_the_stages(config, stopped, lasting_manifest):
    shutil.rmtree(stopped / "stage2")
    with renamed_row(lasting_manifest), pytest.raises(ValueError, match="is not what it was when .*stage1.* was begun"):
        train(config, stopped)


@pytest.mark.fault("another --micro-batch", "said; it goes on")
def test_another_micro_batch_is_said(config, stopped, capsys):
    """As after too little memory."""
    train(replace(config, train=replace(config.train, micro_batch=2)), stopped)
    assert "samples at once (was 5, is 2)" in capsys.readouterr().out


@pytest.mark.fault("killed in fp16, with gradients accumulated", "the same weights, bit for bit")
def test_killed_in_fp16(config, tmp_path, monkeypatch):
    """The scale of the loss goes on as well."""
    config = replace(config, train=replace(config.train, precision="fp16", micro_batch=2, stages="2", save_minutes=0.0))
    train(config, tmp_path / "unbroken")
    step, done = training.Step.__call__, []

    def mortal(self, batches):
        if len(done) == 4:
            done.clear()
            raise Stop
        done.append(True)
        return step(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(training.Step, "__call__", mortal)
        with pytest.raises(Stop):
            train(config, tmp_path / "broken")
    train(config, tmp_path / "broken")
    assert_same(tmp_path / "unbroken", tmp_path / "broken", ("stage2",))


@pytest.mark.fault("another number of threads", "said")
def test_another_number_of_threads_is_said(config, stopped, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train(config, stopped)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert f"may differ in their last bits from those of an unbroken run: threads (was {threads}" in said


@pytest.mark.fault("a full disk while saving", "an error; the snapshots before are whole")
def test_a_full_disk_leaves_the_snapshots_before(config, stopped, monkeypatch):
    there = sorted((stopped / "stage2/snapshots").glob("step-*"))
    fsync = os.fsync

    def full(descriptor):
        if "snapshots" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train(config, stopped)
    assert sorted((stopped / "stage2/snapshots").iterdir()) == there


def _train_in_another_process(config: Config, run: Path, file_size: int | None = None) -> None:
    torch.set_num_threads(1)
    if file_size is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing beyond it is an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    train(config, run)


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported, so that a kill comes while training and not before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ei.training", "ei.models", "torch"])
    return context


@pytest.mark.fault("no room for a snapshot's file", "an error; the snapshots before stay, it goes on from them")
@pytest.mark.skipif(os.name != "posix", reason="needs limits of POSIX")
def test_a_file_that_cannot_grow_leaves_the_snapshots_before(config, stopped, unbroken, processes):
    there = sorted((stopped / "stage2/snapshots").iterdir())
    child = processes.Process(target=_train_in_another_process, args=(config, stopped, 100_000))
    child.start()
    child.join(120)
    assert child.exitcode == 1
    assert sorted((stopped / "stage2/snapshots").iterdir()) == there
    train(config, stopped)
    assert_same(unbroken, stopped)


@pytest.mark.fault("a second process in the folder", "refused")
@pytest.mark.skipif(os.name != "posix", reason="needs signals of POSIX")
def test_two_processes_in_one_folder(config, stopped, processes):
    with training.locked(training.RunFolder(stopped)):
        second = processes.Process(target=_train_in_another_process, args=(config, stopped))
        second.start()
        second.join(120)
    assert second.exitcode == 1
    with pytest.raises(ValueError, match="another process is training in"):  # noqa: SIM117
        with training.locked(training.RunFolder(stopped)), training.locked(training.RunFolder(stopped)):
            pass


@pytest.mark.fault("kill -9 at a random instant", "the same weights, bit for bit")
@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [3, pytest.param(int(os.environ.get("EI_KILLS", 20)), marks=pytest.mark.slow)])
def test_killed_for_good_at_random_instants(config, tmp_path, processes, kills, record_property):
    """kill -9, wherever it happens to be; when a run gets to its end before all kills are done, another is begun."""
    record_property("times", kills)
    config = replace(config, train=replace(config.train, save_minutes=0.0))
    draw, done, runs = random.Random(0), 0, [tmp_path / "broken0"]
    _finish(processes, config, tmp_path / "unbroken")
    while done < kills:
        child = processes.Process(target=_train_in_another_process, args=(config, runs[-1]))
        child.start()
        child.join(draw.uniform(0.2, 4.0))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            done += 1
        else:
            assert child.exitcode == 0, "it failed by itself"
            runs.append(tmp_path / f"broken{len(runs)}")
    _finish(processes, config, runs[-1])
    for run in runs:
        assert_same(tmp_path / "unbroken", run)


def _finish(processes, config: Config, run: Path) -> None:
    child = processes.Process(target=_train_in_another_process, args=(config, run))
    child.start()
    child.join()
    assert child.exitcode == 0
