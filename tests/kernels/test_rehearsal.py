"""The tests that need a card, rehearsed without one: at toy sizes, in the interpreter, graphs played by stand-ins."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: test_on_gpu.py itself runs")
def test_every_test_for_a_card_runs_through():
    environment = os.environ | {"MOR_KERNELS_REHEARSAL": "1", "TRITON_INTERPRET": "1"}
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels/test_on_gpu.py"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 60, done.stdout[-500:]


def test_what_cublas_says_of_its_context_is_no_error():
    """Torch warns once when a backward on a card begins with a matrix product; any other warning is an error here."""
    known = "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context..."
    warnings.warn(known, UserWarning, stacklevel=2)
    with pytest.raises(UserWarning):
        warnings.warn("anything else", UserWarning, stacklevel=2)
