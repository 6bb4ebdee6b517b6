"""A kernel that is launched again is the program that Triton would have found, with the same arguments."""

import json

import pytest
import torch
from test_ahead_of_time import KERNELS, in_its_own_process

from mor_kernels.launch import launch


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


class Kernel:
    """Counts how often a program is looked for, in place of Triton, which has one device here."""

    arg_names = ("x", "n", "SIZE")

    def __init__(self) -> None:
        self.fn, self.searches = object(), 0

    def __getitem__(self, grid: tuple[int, ...]):
        return self.search

    def search(self, x: torch.Tensor, n: int, **constants: int) -> dict:
        self.searches += 1
        return {(3, 1, 1): lambda *arguments: None}


@pytest.mark.parametrize(
    ("other", "searches"),
    [
        ({}, 1),
        ({"n": 22}, 1),
        ({"n": 2**31 + 1}, 2),
        ({"device": "meta"}, 2),
        ({"SIZE": 8}, 2),
        ({"num_warps": 8}, 2),
    ],
)
def test_what_another_program_is_looked_for(other, searches):
    kernel = Kernel()
    for what in ({}, other):
        given = {"n": 21, "device": "cpu", "SIZE": 4, "num_warps": 4} | what
        launch(kernel, (3,), [torch.empty(16, device=given.pop("device"))], [given.pop("n")], **given)
    assert kernel.searches == searches
