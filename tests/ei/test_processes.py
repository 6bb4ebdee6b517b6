"""Several processes do what one does: torchrun starts them here, on the CPU."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ei import predict, train
from ei.config import Config
from ei.processes import Processes
from ei.runs.checkpoint import read_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from several_processes import gradients

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(*words: object) -> subprocess.Popen:
    """The words, in two processes of Python."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [*TORCHRUN, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory, write_study, study_config) -> Config:
    """61 rows in steps of 6, at most two at once: of the last step's one sample the second process has nothing."""
    manifest = write_study(tmp_path_factory.mktemp("processes") / "study", {"train": 61, "val": 10, "test": 31})
    config = study_config(manifest, epochs=2, batch_size=6, micro_batch=2, temperature=True)
    config = replace(config, model=replace(config.model, ranks=(1, 2), dropout=0.1))
    config.save(manifest.parent / "config.yaml")
    return config


@pytest.fixture(scope="module")
def results(config, tmp_path_factory) -> dict[str, Path]:
    """The folders of one process and of two, which also evaluate a copy of the first one's run."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "two")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        save_file(gradients(config, Processes(torch.device("cpu"))), folders["one"] / "gradients.safetensors")
        train(config, folders["one"] / "run")
        predict(folders["one"] / "run", config.data.manifest, folders["one"] / "predicted.csv")
    finally:
        torch.set_num_threads(threads)
    again = shutil.copytree(folders["one"] / "run", folders["two"] / "again")
    config_file = Path(config.data.manifest).parent / "config.yaml"
    process = launch(HERE / "several_processes.py", config_file, folders["two"], again)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert said.count("gate prior") == 1, "the other process is not silent"
    return folders


def test_gradients_are_those_of_one_process(results):
    one, two = (load_file(folder / "gradients.safetensors") for folder in results.values())
    assert one.keys() == two.keys() and "10 loss" in one
    for name, gradient in one.items():
        assert gradient.abs().max() > 0, name
        assert (gradient - two[name]).abs().max() < 1e-6, name


def test_metrics_are_those_of_one_process(results):
    """Of the same weights."""
    for name in ("metrics.json", "gates.json"):
        assert_close(*(json.loads((results[run[0]] / run[1] / name).read_text()) for run in EVALUATED))


def test_each_row_is_predicted_once_in_the_order_of_the_manifest(results):
    ids = []
    for one, run in EVALUATED:
        with (results[one] / run / "predictions.csv").open() as file:
            ids.append([row["id"] for row in csv.DictReader(file)])
    assert len(ids[0]) == 41 and ids[0] == ids[1]


def test_predictions_are_the_same_bytes(results):
    one, two = (folder / "predicted.csv" for folder in results.values())
    assert one.read_bytes() == two.read_bytes()
    assert not two.with_name("predicted.csv.parts").exists()


EVALUATED = (("one", "run"), ("two", "again"))


def test_processes_that_leave_keep_no_threads(tmp_path):
    """Also where the first model in parallel is built after they met, of which torch imports more."""
    program = tmp_path / "program.py"
    program.write_text(LEAVING)
    process = launch(program)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


LEAVING = """
import torch
from ei.processes import Processes
processes = Processes.join("cpu")
model = processes.parallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
assert processes.gathered(processes.index) == [0, 1]
del model
processes.leave()
processes.leave()
from several_processes import require_no_threads_of_gloo
require_no_threads_of_gloo()
"""


def test_a_run_of_two_processes_learns_the_same(results):
    """Dropout differs, so the weights are close and not equal."""
    one, two = (read_checkpoint(folder / "run/stage2/best.safetensors") for folder in results.values())
    assert one.notes["step"] > 0 and one.notes["manifest"] == two.notes["manifest"]
    assert one.parameters.keys() == two.parameters.keys()
    texts = [(folder / "run/stage1/oct/metrics.jsonl").read_text() for folder in results.values()]
    histories = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for ours, theirs in zip(*histories, strict=True):
        assert ours["step"] == theirs["step"]
        if ours["loss"]:
            assert ours["loss"]["total"] == pytest.approx(theirs["loss"]["total"], rel=0.2)


def assert_close(one: object, other: object) -> None:
    """The same but for the last bits of what batches of another size give."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_close(value, other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    else:
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-5) if isinstance(one, float) else other)


@pytest.fixture
def breaking(config, tmp_path) -> Callable[..., tuple[int, str]]:
    """Train in two processes, into a folder, and break it in a way of several_processes.py; exit code and output."""

    def run(folder: Path, *how: object) -> tuple[int, str]:
        config_file = Path(config.data.manifest).parent / "config.yaml"
        process = launch(HERE / "several_processes.py", config_file, folder, *how)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    return run


@pytest.mark.slow
@pytest.mark.timeout(900)  # four runs of two processes
@pytest.mark.fault("one of two processes killed; two processes told to stop", "both end; the same weights, bit for bit")
def test_two_processes_that_are_stopped_go_on(breaking, results, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for how in ("killed", "SIGTERM", "SIGINT"):
        started = time.monotonic()
        code, said = breaking(broken, how)
        assert code != 0, said
        assert time.monotonic() - started < 90
        assert ("stopped by" in said) == (how != "killed"), said
    code, said = breaking(broken)
    assert code == 0, said
    assert "going on in epoch" in said
    for stage in ("stage1/cfp", "stage1/oct", "stage2"):
        ours, theirs = (read_checkpoint(run / "run" / stage / "best.safetensors") for run in (broken, results["two"]))
        for name, tensor in ours.parameters.items():
            assert torch.equal(tensor, theirs.parameters[name]), (stage, name)


@pytest.mark.slow
def test_what_fails_in_the_first_process_is_said_once(breaking, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/other.txt").write_text("not a run")
    code, said = breaking(tmp_path)
    assert code != 0 and said.count("is neither a run nor an empty folder") == 1


@pytest.mark.slow
@pytest.mark.fault("NaN in the loss of one of two processes", "both stop before the step, the sample named")
def test_nan_in_one_process_stops_both(breaking, tmp_path):
    code, said = breaking(tmp_path, "nan")
    assert code != 0
    assert re.search(r"not finite for the samples train\d+, train\d+;", said), said
