"""Print what the programs of every kernel are given, launched by `mor_kernels.launch` and by Triton. No GPU.

A stand-in driver says that an sm_90 card is there; programs are compiled as ever and then given to a recorder.
test_launch.py runs this in its own process.
"""

import json
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import mor_kernels.linear
from mor_kernels import blocks, mor_linear, tables
from mor_kernels.launch import Launch
from mor_kernels.measure import StandInDriver

given: list[tuple[CompiledKernel, list]] = []
searches: list[JITFunction] = []
search = JITFunction.run


def record(program: CompiledKernel) -> None:
    """In place of loading it onto a card."""

    def run(x: int, y: int, z: int, stream: int, function: int, packed: Any, _: Any, __: Any, ___: Any, *rest: Any):
        given.append((program, [x, y, z, stream, function, packed, *map(identified, rest)]))

    program._run, program.function = run, id(program)


def identified(argument: object) -> object:
    """A tensor by its kind and not its place, which is another one at every launch."""
    return [str(argument.dtype), *argument.shape] if isinstance(argument, torch.Tensor) else argument


def count(kernel: JITFunction, *arguments: Any, **options: Any) -> Any:
    searches.append(kernel)
    return search(kernel, *arguments, **options)


def by_triton(launch: Launch, *tensors: torch.Tensor | None) -> None:
    launch.kernel[launch.grid](*tensors, *launch.numbers, **launch.constants)


def step(name: str) -> tuple[list[tuple[CompiledKernel, list]], int]:
    """A forward and a backward: its programs with what they were given, and how many of them Triton had to find."""
    given.clear()
    searches.clear()
    forward_and_backward(**STEPS[name])
    return list(given), len(searches)


def forward_and_backward(
    rows: int = 40, form: str = "branch", *, width: int = 64, shift: int = 0, dtype=torch.bfloat16, router: bool = True
) -> None:
    ranks, bypass, gates = ((2, 4), True, 3) if router else ((4,), False, 0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, requires_grad=True)

    x = torch.empty(rows * width + shift, dtype=torch.bfloat16)[shift:].view(rows, width).requires_grad_()
    weight = torch.empty(32, width, dtype=torch.bfloat16)
    gate = (leaf(gates, width), leaf(gates)) if router else (None, None)
    inner = (leaf(sum(ranks), width), leaf(sum(ranks), 32))
    y = mor_linear(
        x, weight, None, *inner, *gate, ranks=ranks, scaling=[2.0] * len(ranks), bypass=bypass, form=form
    )  # fmt: skip
    y.backward(torch.zeros_like(y))


STEPS: dict[str, dict] = {
    "branch": {},
    "tail": {"form": "tail"},
    "rows that are no multiple of 16": {"rows": 39},
    "x begins 2 bytes behind a multiple of 16": {"shift": 1},
    "a width that is no multiple of 16": {"width": 63},
    "a width of 1": {"width": 1},
    "parameters in fp32": {"dtype": torch.float32},
    "no router": {"router": False},
}


if __name__ == "__main__":
    triton.runtime.driver.set_active(StandInDriver())
    CompiledKernel._init_handles = record
    JITFunction.run = count
    mor_kernels.linear.INTERPRETED = True  # only so that CPU tensors are let in; nothing runs
    small = {key: blocks.Blocks(16, 16, 16, stages=1) for key in blocks.default_tiles((9, 0))}
    tables.table_of = lambda device: tables.Table(small, {})
    for name in STEPS:
        step(name)
    later = {name: step(name) for name in STEPS}
    for name, (launches, found) in later.items():
        with mock.patch.object(Launch, "__call__", by_triton):
            expected, found_by_triton = step(name)
        kernels = [program.metadata.name for program, _ in launches]
        same = [one is other and a == b for (one, a), (other, b) in zip(launches, expected, strict=True)]
        print(json.dumps({"step": name, "kernels": kernels, "same": same, "searches": [found_by_triton, found]}))
