"""Every shipped tile compiles for cards that are not here, without spills and within their shared memory.

The whole matrix takes some minutes and is marked slow (`make kernels-aot` runs it alone); what runs every time is one
case of each kind. All of it runs in processes of its own, with the compiler, which TRITON_INTERPRET would replace.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mor_kernels import blocks, tables

HERE = Path(__file__).parent
KERNELS = {"branch_kernel", "shrink_kernel", "dy_side_kernel", "weight_grad_kernel", "matmul_tail_kernel"}
TARGETS = (80, 86, 89, 90, 100)


def in_its_own_process(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", tables.VARIABLE)}
    environment["PYTHONPATH"] = str(HERE.parents[1] / "kernels")
    command = [sys.executable, str(HERE / script), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compiled(*options: str) -> list[dict]:
    result = in_its_own_process("compile_matrix.py", *options)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, result.stderr[-2000:] + str([line for line in lines if line["trouble"]])
    return lines


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_matrix_compiles_for(target):
    lines = compiled("--targets", str(target))
    assert {line["kernel"] for line in lines} == {*KERNELS, "sum_partials_kernel"}
    assert {(line["dtype"], line["parameters"]) for line in lines} == {
        ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kernels", "options"),
    [
        (KERNELS, "--targets 90 --dtypes bfloat16 --ranks 2,4,8 --rows 65536"),
        (
            {"matmul_tail_tma_kernel"},
            "--targets 90 --dtypes bfloat16 --ranks 2,4,8 --rows 65536 --forms tail --kernels matmul_tail_tma_kernel"
            " --persistent 128 64 256 8 3",
        ),
        ({"branch_kernel"}, "--targets 89 --dtypes float32 --ranks 16,16,16 --rows 1576 --kernels branch_kernel"),
    ],
    ids=["sm_90", "sm_90, persistent", "sm_89, wide rank set"],
)
def test_compiles_for(kernels, options):
    assert {line["kernel"] for line in compiled(*options.split())} >= kernels


def test_the_gate_sees_what_is_wrong_with_a_compiled_kernel():
    spec = importlib.util.spec_from_file_location("compile_matrix", HERE / "compile_matrix.py")
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    fits = {
        "kernel": "matmul_tail_tma_kernel", "target": 90, "dtype": "bfloat16", "ranks": [2, 4, 8],
        "LOCAL": 0, "STACK": 0, "shared": 232448, "wgmma": 4, "mma": 0, "tma": 4,
    }  # fmt: skip
    assert matrix.trouble(fits) == []
    assert matrix.trouble(fits | {"LOCAL": 8}) == matrix.trouble(fits | {"STACK": 8}) == ["spills"]
    assert matrix.trouble(fits | {"wgmma": 0}) == ["no wgmma"]
    assert matrix.trouble(fits | {"tma": 0}) == ["no copy engine"]
    assert matrix.trouble(fits | {"shared": 232449}) == ["shared memory"]
    assert matrix.trouble(fits | {"target": 80, "shared": 0}) == ["no tensor core"]
    assert matrix.trouble(fits | {"target": 89, "mma": 1}) == ["shared memory"]


def test_the_matrix_reads_every_entry_that_a_table_can_have():
    """So no file that ships can name a tile that was not compiled."""
    read: dict[tuple[int, str], set[str]] = {}
    for line in in_its_own_process("compile_matrix.py", "--list").stdout.splitlines():
        found = json.loads(line)
        read.setdefault((found["target"], found["table"]), set()).update(found["read"])
    every = set(map(str, blocks.default_tiles(None)))
    assert all(entries == every for entries in read.values())
    assert {target for target, table in read if table == "defaults"} == {*TARGETS}
    shipped = {path.name for path in tables.SHIPPED.glob("*.json")}
    assert {table for _, table in read} == {"defaults"} | shipped


def test_no_new_compilation_when_the_number_of_rows_varies():
    """One warm-up in each bucket of rows makes every kernel that any other number of rows needs."""
    result = in_its_own_process("count_specialisations.py")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout
    for line in result.stdout.splitlines():
        table, *counts = json.loads(line)
        warm, later = counts[: len(blocks.ROW_BUCKETS)], counts[len(blocks.ROW_BUCKETS) :]
        assert set(later) == {warm[-1]}, line
        # The defaults know few rows and many; a measured table may have a tile for each bucket.
        assert len(set(warm)) == {"defaults": 2, "a tile for each bucket": 4}[table], line
