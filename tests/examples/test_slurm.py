"""The batch script, with stand-ins for what a cluster brings along."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/train.slurm"
SRUN = '#!/bin/bash\nexec "$@"\n'
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$LOG"; fi\n'
TORCHRUN = """#!/bin/bash
trap 'echo saved >> "$LOG"; exit 143' TERM
echo "$@" >> "$LOG"
[ "$LASTS" = 0 ] && exit "$CODE"
for _ in $(seq 100); do sleep 0.1; done
"""


@pytest.fixture
def cluster(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "11"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def submit(**more: str) -> subprocess.Popen:
        environment = {**os.environ, **job, "PATH": path, "LOG": str(tmp_path / "log"), **more}
        return subprocess.Popen(["bash", SCRIPT, "study.csv", "runs/x", "--labels", "a b"], env=environment)

    return submit, tmp_path / "log"


@pytest.mark.parametrize("code", [0, 3])
def test_it_ends_as_training_does(cluster, code):
    submit, log = cluster
    assert submit(LASTS="0", CODE=str(code)).wait(20) == code
    (line,) = log.read_text().splitlines()
    assert "--nnodes=2 --nproc-per-node=4" in line and "--rdzv-endpoint=node7:29500" in line
    assert "--manifest study.csv --out runs/x" in line and line.endswith("--labels a b")


def test_told_to_stop_it_waits_for_the_save_and_queues_again(cluster):
    submit, log = cluster
    job = submit(LASTS="1")
    while not log.exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    assert log.read_text().splitlines()[1:] == ["saved", "requeue 11"]
