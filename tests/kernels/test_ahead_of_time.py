"""The shipped tiles compile for cards that are not here, without spills and within their shared memory.

The whole matrix (five chips, both dtypes, wide rank sets) is a command: see compile_matrix.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BRANCH = {"branch_kernel", "dy_side_kernel", "weight_grad_kernel"}
TAIL = {"shrink_kernel", "matmul_tail_kernel"}


def in_its_own_process(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder with the compiler, which TRITON_INTERPRET would replace."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parents[1] / "kernels")
    command = [sys.executable, str(HERE / script), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("kernels", "options"),
    [
        (BRANCH | TAIL, "--targets 90 --dtypes bfloat16 --rows 65536"),
        (BRANCH, "--targets 90 --dtypes bfloat16 --rows 1576 --forms branch"),
        (
            {"matmul_tail_tma_kernel"},
            "--targets 90 --dtypes bfloat16 --rows 65536 --forms tail --kernels matmul_tail_tma_kernel"
            " --persistent 128 64 256 8 3",
        ),
        (TAIL, "--targets 80 --dtypes bfloat16 --rows 65536 --forms tail"),
        (BRANCH, "--targets 89 --dtypes bfloat16 --rows 1576 --forms branch --ranks 16 16 16"),
    ],
    ids=["sm_90", "sm_90, few rows", "sm_90, persistent", "sm_80", "sm_89, wide rank set"],
)
def test_compiles_for(kernels, options):
    result = in_its_own_process("compile_matrix.py", *options.split())
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, result.stderr[-2000:] + str([line for line in lines if line["trouble"]])
    assert {line["kernel"] for line in lines} >= kernels


def test_no_new_compilation_when_the_number_of_rows_varies():
    """One warm-up with few rows and one with many make every kernel that any other number of rows needs."""
    result = in_its_own_process("count_specialisations.py")
    assert result.returncode == 0, result.stderr[-2000:]
    for line in result.stdout.splitlines():
        few, many, *later = map(int, line.split())
        assert 0 < few < many
        assert set(later) == {many}, line
