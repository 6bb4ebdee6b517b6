"""Print how far the compiled kernels, run in an emulator, are from float64: one line of JSON for each case. No GPU.

    PYTHONPATH=kernels python tests/kernels/emulated.py --target 90 --dtypes bfloat16 --rows 197 --shapes 768,3072
    PYTHONPATH=kernels python tests/kernels/emulated.py --target 90 --rows 6288 --traffic 4

Triton compiles as for the card, and `ptx.py` runs what comes out; torch's own operators run on the CPU.
test_emulated.py runs this in its own process, where TRITON_INTERPRET does not replace the compiler.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from mor_problem import FORMS, Problem, error, leaves, loop, run
from ptx import Memory, Program, Traffic
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

import mor_kernels.linear
from mor_kernels import tables
from mor_kernels.blocks import default_tiles
from mor_kernels.measure import StandInDriver, git_state


class EmulatedCard(StandInDriver):
    """As far as Triton's launch code asks, a card of this compute capability."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)


ALL = 2**31
TRAFFIC = Traffic()


def emulate(kernel: CompiledKernel, most: int = ALL) -> None:
    """In place of loading a compiled kernel onto a card; the traffic is counted if only some programs run."""
    program, kinds = Program(kernel.asm["ptx"]), kernel.src.signature.values()

    def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, _: Any, __: Any, ___: Any, *rest: Any):
        target = triton.runtime.driver.active.get_current_target().arch
        assert f".target sm_{target}" in kernel.asm["ptx"], "a program that was compiled for another card"
        given = [argument for argument, kind in zip(rest, kinds, strict=True) if kind != "constexpr"]
        values = [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in given]
        values += [0] * (len(program.parameters) - len(values))  # Triton's own: room that these kernels do not ask for
        memory = Memory([extent(argument) for argument in rest if isinstance(argument, torch.Tensor)])
        TRAFFIC.kernel = kernel.metadata.name
        program.run((min(x, most), y, z), values, memory, kernel.metadata.shared, TRAFFIC if most < ALL else None)

    kernel._run, kernel.function = launch, 0


def extent(t: torch.Tensor) -> tuple[int, int]:
    """Address and bytes from its first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size() if t.numel() else 0


def errors(problem: Problem, forms: Sequence[str]) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """For each form, relative errors of the output and of every gradient: ours, and those of the loop in torch."""
    expected = run(loop, problem, leaves(problem, torch.float64))
    eager = run(loop, problem, leaves(problem))
    for form in forms:
        got = run(mor_kernels.mor_linear, problem, leaves(problem), form=form)
        yield form, {name: [error(got[name], expected[name]), error(eager[name], expected[name])] for name in expected}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=int, default=90, choices=(80, 86, 89, 90))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[197])
    parser.add_argument("--shapes", nargs="+", default=["768,3072"], help="K,O")
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--ranks", nargs="+", default=["2,4,8"])
    parser.add_argument("--traffic", type=int, default=ALL, metavar="N", help="print what N programs ask of memory")
    parser.add_argument("--without", nargs="+", default=[], choices=["bypass", "bias", "router_bias"])
    options = parser.parse_args()

    # One card in a process: Triton keeps what it compiled for the first one.
    triton.runtime.driver.set_active(EmulatedCard(options.target))
    CompiledKernel._init_handles = lambda kernel: emulate(kernel, options.traffic)
    table = tables.Table(default_tiles(divmod(options.target, 10)), {})
    tables.table_of = lambda device: table
    mor_kernels.linear.INTERPRETED = True  # lets tensors on the CPU in
    made = {"torch": torch.__version__, "triton": triton.__version__}
    made |= {k: v for k, v in git_state([Path(mor_kernels.__file__).parent]).items() if k != "tree_changed"}
    parts = {part: part not in options.without for part in ("bypass", "bias", "router_bias")}
    for dtype, rows, shape, ranks in product(options.dtypes, options.rows, options.shapes, options.ranks):
        K, O = map(int, shape.split(","))
        rank_set = tuple(map(int, ranks.split(",")))
        problem = Problem(rows, K, O, ranks=rank_set, dtype=getattr(torch, dtype), **parts)
        case = made | {"target": options.target, "dtype": dtype, "rows": rows, "K": K, "O": O, "ranks": rank_set}
        for form, found in errors(problem, options.forms):
            if options.traffic == ALL:
                print(json.dumps({**case, "form": form, "errors": found}), flush=True)
            for (kernel, instruction), (least, taken) in TRAFFIC.counts.items():
                counts = {"kernel": kernel, "instruction": instruction, "least": least, "taken": taken}
                print(json.dumps({**case, "form": form, **counts}), flush=True)
            TRAFFIC.counts.clear()


if __name__ == "__main__":
    main()
