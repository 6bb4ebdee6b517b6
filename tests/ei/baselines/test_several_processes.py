"""Baselines in several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gradients_are_those_of_one_process() -> None:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "fusions_in_two_processes.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0 and "the same gradients" in result.stdout, result.stderr[-3000:]
