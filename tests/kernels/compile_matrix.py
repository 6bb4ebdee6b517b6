"""Compile every shipped kernel ahead of time, with no GPU, and print one JSON line for each.

    PYTHONPATH=kernels python tests/kernels/compile_matrix.py [--targets 80 90] [--ranks 2,4,8] [--rows 65536]

The operators' own launch code runs on meta tensors; each launch is caught and handed to the compiler as it stands, so
what is checked is what would run: with the default tiles on every chip, and with each measured table that ships on the
chip it was measured on. Exits with 1 where a kernel spills registers, asks for more shared memory than the chip has, or
misses the tensor cores. test_ahead_of_time.py runs it; the whole takes some minutes.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mor_kernels import matmul_tail_tma, tables
from mor_kernels.blocks import Blocks, TileKey, default_tiles
from mor_kernels.branch import branch
from mor_kernels.dy_side import dy_side
from mor_kernels.matmul_tail import matmul_tail
from mor_kernels.ranks import RankLayout
from mor_kernels.shrink import shrink
from mor_kernels.tables import FUSED_FORMS, Table
from mor_kernels.weight_grad import sum_partials, x_partials

TARGETS = (80, 86, 89, 90, 100)
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # bytes a block may ask for
ROWS = (1576, 6288, 12608, 65536)  # one of each bucket
RANK_SETS = ((2, 4, 8), (16, 16, 16))  # the default one, and one whose columns are padded to 64
# dtypes of x and of the parameters: all in one, and fp32 parameters beside activations under autocast. fp16 compiles
# to the same instructions as bf16.
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32))
K, O = 768, 3072

# (kernel, target, dtype, ranks) -> bytes of stack that are known and why they are put up with.
KNOWN_STACK: dict[tuple[str, int, str, tuple[int, ...]], int] = {}

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


@dataclass(frozen=True)
class Case:
    """A forward and a backward in both forms: on a chip, with a table, for one dtype and rank set."""

    target: int
    source: str
    table: Table
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    ranks: tuple[int, ...]


def shipped_tables(target: int) -> dict[str, Table]:
    """The defaults, and what was measured on a card of this capability, as that card would see them."""
    defaults = Table(default_tiles(divmod(target, 10)), {})
    found = {"defaults": defaults}
    for path in sorted(tables.SHIPPED.glob("*.json")):
        content = json.loads(path.read_text())
        if content["made"]["capability"] == list(divmod(target, 10)):
            found[path.name] = defaults.with_entries_of(tables.read_table(path, content["gpu"]))
    return found


def launches(case: Case, rows: int, forms=FUSED_FORMS) -> list[tuple[JITFunction, dict, dict]]:
    """Every (kernel, arguments, options) that a forward and a backward would launch."""
    caught = []

    def catch(self, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in OPTIONS & kwargs.keys()}
        caught.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    with (
        mock.patch.object(JITFunction, "run", catch),
        mock.patch.object(tables, "table_of", lambda device: case.table),
        mock.patch.object(matmul_tail_tma, "multiprocessors", lambda device: 132),
    ):
        launch_everything(case, rows, forms)
    return caught


def launch_everything(case: Case, rows: int, forms) -> None:
    layout = RankLayout(case.ranks, (2.0,) * len(case.ranks), True)
    with torch.device("meta"):
        x, dy = torch.empty(rows, K, dtype=case.dtype), torch.empty(rows, O, dtype=case.dtype)
        weight, bias = torch.empty(O, K, dtype=case.dtype), torch.empty(O, dtype=case.dtype)
        a = torch.empty(layout.rank_sum, K, dtype=case.parameter_dtype)
        b = torch.empty(layout.rank_sum, O, dtype=case.parameter_dtype)
        router = torch.empty(layout.gates, K, dtype=case.parameter_dtype)
        router_bias = torch.empty(layout.gates, dtype=case.parameter_dtype)
        h, gates = torch.empty(rows, layout.rank_sum, dtype=case.dtype), torch.empty(rows, layout.gates)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    for form in forms:
        if form == "branch":
            branch(x, a, router, router_bias, b, bias, layout, y, h, gates)
        else:
            gated = shrink(x, a, router, router_bias, layout, h, gates)
            matmul_tail(x, weight.t(), gated, b, None, bias, out=y)
        dz, partial_b, partial_bias = dy_side(
            dy, b, h, gates, a, router, layout, dx=dx if form == "branch" else None, with_weights=True
        )
        if form == "tail":
            matmul_tail(dy, weight, dz, a, router, None, out=dx)
    gradients = [torch.empty_like(t) for t in (b, a, router, router_bias)]
    sum_partials(partial_b, x_partials(x, dz, layout), partial_bias, layout, *gradients)


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """The specialisation that the just-in-time compiler would make of these arguments."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, where = arguments[parameter.name], (parameter.num,)
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
            signature[parameter.name] = kind.replace(" ", "")
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[where] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[where] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def entries_read(case: Case, rows: Iterable[int]) -> set[TileKey]:
    """The keys of the table's tiles that this case's launches ask for."""
    read = set()

    class Noting(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    noting = replace(case, table=Table(Noting(case.table.tiles), {}))
    for row_count in rows:
        launches(noting, row_count)
    return read


def compile_case(case: Case, rows: tuple[int, ...], forms: tuple[str, ...], kernels: set[str] | None) -> list[dict]:
    """What the compiler reports of each different kernel of this case."""
    seen, lines = set(), []
    for row_count in rows:
        for kernel, arguments, options in launches(case, row_count, forms):
            built = source(kernel, arguments)
            key = (built.hash(), tuple(sorted(options.items())))
            if key in seen or (kernels and kernel.__name__ not in kernels):
                continue
            seen.add(key)
            compiled = triton.compile(built, target=GPUTarget("cuda", case.target, 32), options=options)
            ptx = compiled.asm["ptx"]
            line = {
                "kernel": kernel.__name__, "target": case.target, "table": case.source,
                "dtype": str(case.dtype)[6:], "parameters": str(case.parameter_dtype)[6:], "ranks": case.ranks,
                "rows": row_count, **options,
                "blocks": {k: v for k, v in arguments.items() if k.startswith(("BLOCK", "SLICE_", "WITH"))},
                "shared": compiled.metadata.shared, **resources(compiled.asm["cubin"]),
                "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"),
                "tma": ptx.count("cp.async.bulk.tensor"),
                "async16": len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)),
                "async_any": ptx.count("cp.async.c"),
                "load16": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
                "load2": len(re.findall(r"ld\.global\S*\.b16 ", ptx)),
            }  # fmt: skip
            lines.append(line | {"trouble": trouble(line)})
    return lines


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes from the compiler's report."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def trouble(line: dict) -> list[str]:
    """What is wrong with one compiled kernel: spills, too much shared memory, or no tensor core where one is due."""
    found = []
    allowed = KNOWN_STACK.get((line["kernel"], line["target"], line["dtype"], tuple(line["ranks"])), 0)
    if line["LOCAL"] or line["STACK"] > allowed:
        found.append("spills")
    if line["shared"] > SHARED_LIMIT[line["target"]]:
        found.append("shared memory")
    if line["dtype"] != "float32":
        large = line["kernel"].startswith("matmul_tail")
        found += ["no wgmma"] * (line["target"] == 90 and large and not line["wgmma"])
        found += ["no copy engine"] * (line["target"] == 90 and "tma" in line["kernel"] and not line["tma"])
        multiplies = line["kernel"] != "sum_partials_kernel"
        found += ["no tensor core"] * (line["target"] < 90 and multiplies and not line["mma"])
    return found


def cases(targets, rank_sets, dtypes=DTYPES) -> Iterator[Case]:
    for target, ranks, (dtype, parameter_dtype) in product(targets, rank_sets, dtypes):
        for name, table in shipped_tables(target).items():
            yield Case(target, name, table, dtype, parameter_dtype, ranks)


def with_persistent(case: Case, tile: Blocks) -> Case:
    every = {key: tile for key in case.table.tiles if key[0] == "matmul_tail"}
    table = case.table.with_entries_of(Table(every, {}))
    return replace(case, source="with a persistent tile", table=table)


def rank_set(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--ranks", type=rank_set, nargs="+", default=RANK_SETS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of x")
    parser.add_argument("--forms", nargs="+", default=FUSED_FORMS, choices=FUSED_FORMS)
    parser.add_argument("--kernels", nargs="+", default=None)
    parser.add_argument("--persistent", type=int, nargs=5, help="rows inner columns warps stages of matmul_tail_tma")
    parser.add_argument("--list", action="store_true", help="compile nothing; print what is read of each table")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    wanted = [pair for pair in DTYPES if str(pair[0])[6:] in options.dtypes]
    chosen = list(cases(options.targets, options.ranks, wanted))
    if options.persistent:
        chosen = [with_persistent(case, Blocks(*options.persistent, persistent=True)) for case in chosen]
    if options.list:
        for case in chosen:
            read = sorted(map(str, entries_read(case, options.rows)))
            print(json.dumps({"target": case.target, "table": case.source, "read": read}))
        return
    failures = 0
    with ProcessPoolExecutor(options.processes) as pool:
        kernels = set(options.kernels) if options.kernels else None
        waiting = [pool.submit(compile_case, c, tuple(options.rows), tuple(options.forms), kernels) for c in chosen]
        for done in waiting:
            for line in done.result():
                failures += bool(line["trouble"])
                print(json.dumps(line), flush=True)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
