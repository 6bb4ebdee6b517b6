"""A kernel that is launched again is the program that Triton would have found, with the same arguments."""

import json
from contextlib import nullcontext

import pytest
import torch
from mor_problem import FORMS, NAMES, Problem, leaves, run
from test_ahead_of_time import KERNELS, in_its_own_process

import mor_kernels
from mor_kernels import blocks, branch, dy_side, linear, matmul_tail, shrink, tables, weight_grad
from mor_kernels.launch import Launch


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
    """Counts how often a program is looked for, in place of Triton."""

    arg_names = ("x", "y", "n", "SIZE")

    def __init__(self) -> None:
        self.searches = 0

    def __getitem__(self, grid: tuple[int, ...]):
        return self.search

    def search(self, *arguments: object, **constants: int) -> dict:
        self.searches += 1
        return {(3, 1, 1): lambda *arguments: None}


BUFFER = torch.zeros(64)


@pytest.mark.parametrize(
    ("x", "y", "searches"),
    [
        (BUFFER, None, 1),
        (BUFFER[16:], None, 1),
        (BUFFER[1:], None, 2),
        (BUFFER.half(), None, 2),
        (BUFFER, BUFFER, 2),
    ],
    ids=["the same", "aligned", "not aligned", "another dtype", "one more"],
)
def test_for_what_tensors_another_program_is_looked_for(x, y, searches):
    kernel = Kernel()
    launch = Launch(kernel, (3,), (21,), SIZE=4)
    for tensors in ((BUFFER, None), (x, y), (BUFFER, None), (x, y)):
        launch(*tensors)
    assert kernel.searches == searches


DECIDED_ONCE = (
    branch._launch, shrink._launch, dy_side._launch, weight_grad._launch_x, weight_grad._launch_sums,
    matmul_tail._launch,
)  # fmt: skip
TILES = {key: blocks.Blocks(16, 16, 16, stages=len(key[1])) for key in blocks.default_tiles(None)}
CHANGES = [
    {"rows": 39}, {"rows": 5000}, {"width": 31}, {"out": 47}, {"dtype": torch.float16}, {"ranks": (4, 2, 8)},
    {"bypass": False}, {"bias": False}, {"router_bias": False},
    *({"tile": kernel} for kernel in blocks.KERNELS), {"tf32": True}, {"strided": "x"}, {"strided": "dy"},
    {"strided": "weight"}, {"wanted": ("x",)}, {"wanted": ("A",)},
]  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every `Launch` that is called, in place of running it."""
    found: list[Launch] = []
    monkeypatch.setattr(Launch, "__call__", lambda launch, *tensors: found.append(launch))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # nor has the meta device any
    monkeypatch.setattr(linear, "INTERPRETED", True)  # lets tensors on the CPU in, also where there is a card
    for function in DECIDED_ONCE:
        function.cache_clear()
    return found


def launches_of(
    launched: list[Launch], form: str, device: str = "cpu", tile: str = "", tf32: bool = False, strided: str = "",
    wanted: tuple[str, ...] = NAMES, **sizes,
) -> list[Launch]:  # fmt: skip
    """What a forward and a backward launch."""
    launched.clear()
    problem = Problem(**({"rows": 40, "width": 32, "out": 48} | sizes), device=device)
    tensors = leaves(problem)
    for name in NAMES:
        if tensors[name] is not None:
            tensors[name].requires_grad_(name in wanted)
    if strided:
        t = tensors[strided]
        inside = torch.empty(t.shape[0], t.shape[1] + 16, dtype=t.dtype, device=device)[:, : t.shape[1]]
        tensors[strided] = inside.requires_grad_(t.requires_grad)
    changed = {key: value._replace(warps=8) if key[0] == tile else value for key, value in TILES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "table_of", lambda device: tables.Table(changed, {}))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            run(mor_kernels.mor_linear, problem, tensors, form=form)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    return list(launched)


def content(launches: list[Launch]) -> list[tuple]:
    return [(launch.kernel, launch.grid, launch.numbers, launch.constants) for launch in launches]


@pytest.mark.parametrize("form", FORMS)
def test_a_launch_is_decided_once(form, launched):
    first, again = launches_of(launched, form), launches_of(launched, form)
    assert len(first) == len(again) == {"branch": 4, "tail": 6}[form]
    assert all(one is other for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_was_decided_for_others_is_not_taken(change, launched):
    def contents(**change) -> list[tuple]:
        return [entry for form in FORMS for entry in content(launches_of(launched, form, **change))]

    expected = contents(**change)
    for function in DECIDED_ONCE:
        function.cache_clear()
    others = contents()
    assert contents(**change) == expected != others


@pytest.mark.parametrize("form", FORMS)
def test_each_device_has_its_own(form, launched):
    here, there = launches_of(launched, form), launches_of(launched, form, device="meta")
    assert content(here) == content(there)
    assert not {id(launch) for launch in here} & {id(launch) for launch in there}


@pytest.mark.parametrize(("index", "changes"), [(0, []), (1, [1])])
def test_another_card_is_made_the_current_one(index, changes, monkeypatch):
    changed = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(changed.append(device.index)))
    with linear._on(torch.device("cuda", index)):
        assert changed == changes
