"""A kernel that is launched again is the program that Triton would have found, with the same arguments."""

import json

import pytest
from test_ahead_of_time import KERNELS, in_its_own_process


@pytest.fixture(scope="module")
def steps() -> list[dict]:
    result = in_its_own_process("same_launches.py")
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_same_programs_with_the_same_arguments(steps):
    assert len(steps) == 8
    assert {kernel for step in steps for kernel in step["kernels"]} == {*KERNELS, "sum_partials_kernel"}
    for step in steps:
        assert all(step["same"]), step


def test_triton_does_not_look_for_them_again(steps):
    for step in steps:
        assert step["searches"] == [len(step["kernels"]), 0], step
