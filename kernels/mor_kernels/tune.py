"""Find this card's fastest tiles and forms, and write them down: `python -m mor_kernels.tune`.

1. What the forms lean on: the library's GEMM, as it is and adding to its result (beta = 1).
2. Every kernel at every candidate tile, in each bucket of rows. A tile that does not fit into the chip's shared memory
   is left out, and said to be.
3. With the winning tiles, forward and backward of the ViT linears: each form, and torch's own operators.

All results are first compared with float64; what is wrong gets no time and cannot win. Times are replays of CUDA
graphs on a cold L2 cache, calls taking turns. The table that is written goes on top of what ships:

    python -m mor_kernels.tune --out my_card.json
    MOR_KERNELS_TABLE=my_card.json python train.py

    TRITON_INTERPRET=1 python -m mor_kernels.tune --device cpu     tries the whole path; its times mean nothing

The file is written anew after every kernel and every linear, so a run that is killed leaves what it had found. A file
that is there already is not replaced.

Shapes: T rows (all tokens), K in, O out, R sum of ranks, G router outputs.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mor_kernels import tables
from mor_kernels.blocks import KERNELS, Blocks, TileKey, kind, row_bucket
from mor_kernels.branch import branch
from mor_kernels.dy_side import dy_side
from mor_kernels.linear import linear_backward, linear_forward
from mor_kernels.matmul_tail import matmul_tail
from mor_kernels.measure import Name, captured, git_state, in_turn, quantiles, side_stream
from mor_kernels.ranks import INTERPRETED, RankLayout, rank_layout
from mor_kernels.reference import Problem, draw, exact, red
from mor_kernels.shrink import shrink
from mor_kernels.tables import FUSED_FORMS, SHIPPED, FormKey, Forms, Table
from mor_kernels.weight_grad import x_partials

LAYOUT = rank_layout((2, 4, 8), (2.0, 2.0, 2.0), True)
VIT_B = ((768, 2304), (768, 768), (768, 3072), (3072, 768))  # qkv, proj, fc1, fc2
VIT_L = ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024))
TILE_SHAPES = ((768, 3072), (3072, 768), (768, 768))  # tiles are shared by all K and O, so these stand for all
ROWS = (1576, 6288, 12608, 65536)  # one for each bucket
QUICK = 4  # candidates of each kernel
NOISE = 0.02  # a form that is not faster by more than this does not replace the safer one
TILES_SHARE = 0.7  # of the time, so that some is left for the forms

# The first ones are the likeliest; --quick tries no others. Tiles are rows, inner, columns, warps, stages.
CANDIDATES: dict[str, list[Blocks]] = {
    "shrink": [
        Blocks(*tile, warps=4)
        for tile in ((16, 256), (64, 128), (32, 256), (32, 128), (16, 128), (64, 256), (128, 128), (128, 64))
    ]
    + [Blocks(rows, inner, warps=8) for rows, inner in ((64, 128), (64, 256), (128, 128), (128, 64))],
    "branch": [
        Blocks(*tile)
        for tile in (
            (16, 256, 256), (64, 128, 128), (32, 128, 128), (32, 256, 256), (16, 128, 128), (16, 256, 128),
            (32, 256, 128), (64, 256, 128), (64, 128, 256, 8), (64, 128, 64), (128, 128, 128, 8), (128, 64, 128, 8),
        )
    ],
    "dy_side": [
        Blocks(*tile)
        for tile in (
            (16, 256, 256), (64, 128, 128), (32, 128, 128), (32, 256, 128), (16, 128, 128), (64, 128, 64),
            (64, 256, 128), (64, 128, 128, 8), (64, 256, 128, 8), (128, 128, 128, 8), (128, 64, 128, 8),
        )
    ],
    "weight_grad": [
        Blocks(0, *tile)
        for tile in (
            (64, 128), (64, 256), (128, 128), (32, 128), (32, 256), (64, 64), (64, 128, 4, 4), (128, 128, 8),
            (128, 256, 8), (64, 256, 8),
        )
    ],
    "matmul_tail": [
        Blocks(*tile)
        for tile in (
            (128, 64, 256, 8, 3), (128, 64, 128, 4, 4), (128, 64, 256, 8, 3, True), (64, 64, 128, 4, 3),
            (128, 64, 128, 8, 3), (128, 64, 256, 8, 4), (256, 64, 128, 8, 3), (64, 64, 256, 4, 4), (64, 64, 64, 4, 5),
            (128, 128, 128, 8, 3), (128, 32, 256, 8, 4), (128, 64, 128, 8, 4, True), (128, 64, 128, 4, 4, True),
            (256, 64, 128, 8, 3, True),
        )
    ],
}  # fmt: skip


Call = Callable[[], object]
Keep = Callable[[dict, list], None]  # of the winners and the times so far


def forget(winners: dict, evidence: list) -> None:
    """Keeps nothing."""


class Part(NamedTuple):
    """One kernel on one problem."""

    launch: Callable[[], Any]
    results: Callable[[Any], dict[str, Tensor]]  # of what launch gave, the tensors to check, named as in `exact`
    bytes: int  # that a launch has to move: each input read once and each output written once


@dataclass(frozen=True)
class Run:
    """What is measured, how long, and where."""

    device: str
    dtype: torch.dtype
    shapes: Sequence[tuple[int, int]]
    tile_shapes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    candidates: dict[str, list[Blocks]]
    seconds: float
    until: float  # on time.monotonic's clock
    tiles_until: float

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.until

    @property
    def out_of_time_for_tiles(self) -> bool:
        return time.monotonic() > self.tiles_until

    def ready(self, call: Call) -> Call:
        """To be timed without what it takes to launch: as a CUDA graph, where there is a card."""
        return captured(call) if self.device == "cuda" else call

    def time(self, ready: dict[Name, Call]) -> dict[Name, list[float]]:
        """Microseconds as [median, 20 % quantile, 80 % quantile]."""
        if not ready:
            return {}
        least = 10 if self.device == "cuda" else 2
        times = in_turn(ready, self.seconds * len(ready), launches_count=False, device=self.device, least=least)
        return {name: quantiles(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the table (default: named after the card, in this folder)")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK} tiles of each kernel, on one shape")
    parser.add_argument("--shape", type=_shape, action="append", default=[], metavar="K,O", help="one more linear")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows, at most one for each bucket")
    parser.add_argument("--dtype", choices=tables.DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.02, help="of timing for each candidate (default: 0.02)")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after this")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not INTERPRETED:
        parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment, before Python starts")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu tries the whole path in Triton's interpreter")
    run = plan(options)
    if len({row_bucket(rows) for rows in run.rows}) < len(run.rows):
        parser.error(f"--rows must fall into one bucket each, got {run.rows}")
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    gpu, capability = tables.card(device)
    out = options.out or Path(tables.file_name(gpu))
    if options.device == "cpu" and out.resolve().parent == SHIPPED.resolve():
        parser.error(f"--out must not be in {SHIPPED}: the interpreter's times mean nothing")

    if out.exists():  # or a run that is killed would leave a part in the place of a whole table
        parser.error(f"--out {out} exists already; move it away, or name another file")

    content: dict[str, Any] = {"gpu": gpu, "made": made(capability)}  # the commit is read before anything is measured
    if options.device == "cpu":
        content["dry_run"] = True
    print(json.dumps(content["made"]))
    trial = out.with_name(f".{out.name}.trial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(trial, content)
        trial.unlink()
    except OSError as error:  # said now, not after minutes of measuring
        parser.error(f"--out {out} cannot be written: {error.strerror}")

    def keep_tiles(tiles: dict[TileKey, Blocks], evidence: list[dict[str, Any]]) -> None:
        content["tiles"], content["measured"]["tiles"] = tiles_as_json(tiles), evidence
        write(out, content)

    def keep_forms(forms: dict[FormKey, Forms], evidence: list[dict[str, Any]]) -> None:
        content["forms"], content["measured"]["forms"] = forms_as_json(forms), evidence
        write(out, content)

    with side_stream() if options.device == "cuda" else nullcontext():
        content["measured"] = {"library": measure_library(run)}
        base = tables.table_of(device)
        tiles, evidence = tune_tiles(run, base, keep_tiles)
        keep_tiles(tiles, evidence)
        forms, evidence = tune_forms(run, base.with_entries_of(Table(tiles, {})), keep_forms)
        keep_forms(forms, evidence)
    print(f"{len(tiles)} tiles and {len(forms)} forms in {out}")
    if options.device == "cuda":
        tables.read_table(out, gpu)
        print(f"to use them: {tables.VARIABLE}={out.resolve()}")


def plan(options: argparse.Namespace) -> Run:
    dtype = tables.DTYPES[options.dtype]
    candidates = CANDIDATES if kind(dtype) == "16-bit" else {kernel: _smaller(c) for kernel, c in CANDIDATES.items()}
    shapes: tuple[tuple[int, int], ...] = tuple(dict.fromkeys((*VIT_B, *VIT_L, *options.shape)))
    tile_shapes: tuple[tuple[int, int], ...] = TILE_SHAPES
    rows: tuple[int, ...] = ROWS
    if options.quick:
        candidates, tile_shapes = {kernel: c[:QUICK] for kernel, c in candidates.items()}, TILE_SHAPES[:1]
    if options.device == "cpu":
        dtype = torch.float16  # the interpreter is wrong on bf16
        shapes, rows = tuple(options.shape) or ((24, 40), (40, 24)), (40,)
        candidates, tile_shapes = {kernel: c[:2] for kernel, c in candidates.items()}, shapes[:1]
    now, limit = time.monotonic(), 60 * options.minutes
    return Run(
        options.device, dtype, shapes, tile_shapes, tuple(options.rows or rows), candidates,
        options.seconds, now + limit, now + TILES_SHARE * limit,
    )  # fmt: skip


def made(capability: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "capability": capability,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "git": git_state([Path(__file__).parent]),
    }


def measure_library(run: Run) -> list[dict[str, Any]]:
    """What adding to the result costs the library's GEMM, forward and for dx."""
    found = []
    for rows, (K, O) in itertools.product(run.rows, run.tile_shapes):
        calls = library_calls(draw(rows, K, O, LAYOUT, run.dtype, run.device))
        times = run.time({name: run.ready(call) for name, call in calls.items()})
        found.append({"K": K, "O": O, "rows": rows, "microseconds": times})
        rate = 2e-6 * rows * K * O / times["linear"][0]
        forward = times["matmul, beta = 1"][0] / times["matmul"][0]
        backward = times["dx, beta = 1"][0] / times["dx"][0]
        print(
            f"T={rows} {K}->{O}: linear {times['linear'][0]:.1f} us, {rate:.0f} TFLOP/s; "
            f"beta = 1 costs {forward:.3f}, for dx {backward:.3f}"
        )
    return found


def library_calls(problem: Problem) -> dict[str, Call]:
    x, weight, bias, dy = problem.x, problem.weight, problem.bias, problem.dy
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    return {
        "linear": lambda: F.linear(x, weight, bias),
        "matmul": lambda: torch.mm(x, weight.t(), out=y),
        "matmul, beta = 1": lambda: y.addmm_(x, weight.t()),
        "dx": lambda: torch.mm(dy, weight, out=dx),
        "dx, beta = 1": lambda: dx.addmm_(dy, weight),
    }


def tune_tiles(run: Run, base: Table, keep: Keep = forget) -> tuple[dict[TileKey, Blocks], list[dict[str, Any]]]:
    """The tile of smallest mean slowdown against the best of each shape, by kernel and bucket; and all times."""
    winners: dict[TileKey, Blocks] = {}
    evidence: list[dict[str, Any]] = []
    # dy_side also sums over rows, with weight_grad's tile, so it comes after it.
    for kernel in sorted(KERNELS, key="dy_side".__eq__):
        for rows in run.rows:
            key = (kernel, kind(run.dtype), row_bucket(rows))
            slowdowns: dict[Blocks, list[float]] = {}
            for K, O in run.tile_shapes:
                if run.out_of_time_for_tiles:
                    print(f"out of time before {kernel} T={rows} {K}->{O}")
                    continue
                times, record = time_candidates(run, kernel, rows, K, O, base.with_entries_of(Table(winners, {})))
                evidence.append(record)
                for tile, (median, *_) in times.items():
                    slowdowns.setdefault(tile, []).append(median / min(t[0] for t in times.values()))
            means = {tile: sum(s) / len(s) for tile, s in slowdowns.items() if len(s) == len(run.tile_shapes)}
            if means:
                winners[key] = min(means, key=lambda tile: means[tile])
                print(f"{kernel} T={rows}: {winners[key]}, {means[winners[key]]:.3f} of the best on average")
            keep(winners, evidence)
    return winners, evidence


def time_candidates(
    run: Run, kernel: str, rows: int, K: int, O: int, table: Table
) -> tuple[dict[Blocks, list[float]], dict[str, Any]]:
    """Microseconds of every tile that fits and gives right results; the rest with the reason."""
    problem = draw(rows, K, O, LAYOUT, run.dtype, run.device)
    expected = exact(problem)
    part = parts(problem, expected)[kernel]
    refused: dict[str, str] = {}
    calls: dict[Blocks, Call] = {}
    for tile in run.candidates[kernel]:
        with using(table.with_entries_of(Table({(kernel, kind(run.dtype), row_bucket(rows)): tile}, {}))):
            reason = unfit(kernel, tile, run)
            if reason is None:
                checked = _checked(run, part.launch, part.results, expected)
                if not isinstance(checked, str):
                    calls[tile] = checked
                    continue
                reason = checked
            refused[_name(tile)] = reason
            print(f"    {kernel} {_name(tile)}: {reason}")
    del expected
    times = run.time(calls)
    if times:
        best = min(times, key=lambda tile: times[tile][0])
        rate = 1e-6 * part.bytes / times[best][0]
        print(f"    {kernel} T={rows} {K}->{O}: {_name(best)} {times[best][0]:.1f} us, {rate:.2f} TB/s")
    record: dict[str, Any] = {
        "kernel": kernel, "K": K, "O": O, "rows": rows, "bytes": part.bytes,
        "microseconds": {_name(tile): t for tile, t in times.items()}, "refused": refused,
    }  # fmt: skip
    return times, record


def unfit(kernel: str, tile: Blocks, run: Run) -> str | None:
    """Why this tile need not be compiled for this card; None where it may fit."""
    if run.device == "cpu":
        return None
    if tile.persistent and torch.cuda.get_device_capability() < (9, 0):
        return "needs the tensor memory accelerator of sm_90"
    limit = torch.cuda.get_device_properties().shared_memory_per_block_optin
    need = shared_floor(kernel, tile, run.dtype.itemsize)
    return f"needs {need} bytes of shared memory or more, the chip has {limit}" if need > limit else None


def shared_floor(kernel: str, tile: Blocks, itemsize: int, narrow: int = LAYOUT.columns) -> int:
    """Bytes that the operands of a tile's main loop fill at the least: all but one of its stages."""
    if kernel == "matmul_tail":
        operands = tile.inner * (tile.rows + tile.columns)
    elif kernel == "weight_grad":
        operands = tile.inner * (tile.columns + narrow)
    else:
        operands = tile.inner * (tile.rows + narrow)
    return (tile.stages - 1) * operands * itemsize


def _checked(
    run: Run, call: Callable[[], Any], results: Callable[[Any], dict[str, Tensor]], expected: dict[str, Tensor]
) -> Call | str:
    """The call, ready to be timed, or why it gets no time: whatever a compiler or a capture raises, others go on."""
    try:
        return red(results(call()), expected, run.dtype) or run.ready(call)
    except triton.runtime.errors.OutOfResources as error:
        return f"needs {error.required} of {error.name}, the chip has {error.limit}"
    except Exception as error:  # ptxas's and Triton's own have no base in common with torch's
        return f"{type(error).__name__}: {str(error)[:160]}"


def parts(problem: Problem, expected: dict[str, Tensor]) -> dict[str, Part]:
    """Every kernel with the inputs that it would get; what another kernel makes is taken from `expected`."""
    x, weight, bias, a, b, router_weight, router_bias, dy, layout = problem
    R, stacked = layout.rank_sum, layout.rank_sum + layout.gates
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    h, gates = expected["h"].to(x.dtype), expected["gates"].float()
    gated = F.pad(expected["gated"], (0, layout.rank_columns - R)).to(x.dtype)
    dz = F.pad(expected["dz"], (0, layout.columns - stacked)).to(x.dtype)
    new_h, new_gates = torch.empty_like(h), torch.empty_like(gates)
    kept = h.nbytes + gates.nbytes
    return {
        "shrink": Part(
            lambda: shrink(x, a, router_weight, router_bias, layout, new_h, new_gates),
            lambda made: {"h": new_h, "gates": new_gates, "gated": made[:, :R]},
            x.nbytes + kept + gated.nbytes,
        ),
        "branch": Part(
            lambda: branch(x, a, router_weight, router_bias, b, bias, layout, y, new_h, new_gates),
            lambda _: {"h": new_h, "gates": new_gates, "y0": y},
            x.nbytes + y.nbytes + kept,
        ),
        "dy_side": Part(
            lambda: dy_side(dy, b, h, gates, a, router_weight, layout, dx=dx, with_weights=True),
            lambda made: {
                "dz": made[0][:, :stacked],
                "dx0": dx,
                "db": made[1].sum(0),
                "drouter_bias": made[2].sum(0),
            },
            dy.nbytes + dx.nbytes + kept + dz.nbytes,
        ),
        "weight_grad": Part(
            lambda: x_partials(x, dz, layout),
            lambda made: {"da": made.sum(0)[:R], "drouter_weight": made.sum(0)[R:]},
            x.nbytes + dz.nbytes,
        ),
        "matmul_tail": Part(
            lambda: matmul_tail(x, weight.t(), gated, b, None, bias, out=y),
            lambda _: {"y": y},
            x.nbytes + y.nbytes + weight.nbytes + gated.nbytes,
        ),
    }


def tune_forms(run: Run, table: Table, keep: Keep = forget) -> tuple[dict[FormKey, Forms], list[dict[str, Any]]]:
    """The fastest right way to go forward and back, by dtype, K, O and bucket; and all times."""
    winners: dict[FormKey, Forms] = {}
    evidence: list[dict[str, Any]] = []
    for rows, (K, O) in itertools.product(run.rows, run.shapes):
        if run.out_of_time:
            print(f"out of time before the forms of T={rows} {K}->{O}")
            continue
        problem = draw(rows, K, O, LAYOUT, run.dtype, run.device)
        expected = exact(problem)
        refused = {}
        calls: dict[str, Call] = {}
        with using(table):
            for name, step in steps(problem).items():
                checked = _checked(run, step, lambda made: made, expected)
                if isinstance(checked, str):
                    refused[name] = checked
                    print(f"    {name} T={rows} {K}->{O}: {checked}")
                else:
                    calls[name] = checked
            del expected
            times = run.time(calls)
        winners[run.dtype, K, O, row_bucket(rows)] = winner = fastest({name: t[0] for name, t in times.items()})
        evidence.append({"K": K, "O": O, "rows": rows, "microseconds": times, "refused": refused})
        cells = ", ".join(f"{name} {t[0]:.1f}" for name, t in times.items())
        print(f"T={rows} {K}->{O}: {winner}; microseconds: {cells}")
        keep(winners, evidence)
    return winners, evidence


def fastest(microseconds: dict[str, float]) -> Forms:
    """The winner among what `steps` names; a wrong form is not there, and without a right one the library it is.

    >>> fastest({"branch branch": 100.0, "tail branch": 90.0, "library": 120.0})
    Forms(forward='tail', backward='branch', torch_wins=False)
    >>> fastest({"branch branch": 100.0, "tail branch": 99.0, "library": 80.0})
    Forms(forward='branch', backward='branch', torch_wins=True)
    """
    fused = {name: t for name, t in microseconds.items() if name != "library"}
    if not fused:
        return Forms(torch_wins=True)
    best = min(fused, key=lambda name: fused[name])
    safe = "branch branch"
    if safe in fused and fused[safe] <= fused[best] * (1 + NOISE):
        best = safe
    forward, backward = best.split()
    library = microseconds.get("library", float("inf")) < fused[best] * (1 - NOISE)
    return Forms(forward, backward, library)


def steps(problem: Problem) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Forward and backward in one call: "<forward form> <backward form>", and "library"."""

    def fused(forward: str, backward: str) -> dict[str, Tensor]:
        *tensors, dy, layout = problem
        settings = (list(layout.ranks), list(layout.scaling), layout.bypass)
        y, h, gates = linear_forward(*tensors, *settings, forward)
        x, weight, _, *parameters = tensors
        gradients = linear_backward(dy, x, weight, *parameters, h, gates, *settings, backward, True, True)
        return {"y": y, **dict(zip(GRADIENTS, gradients, strict=True))}

    found: dict[str, Callable[[], dict[str, Tensor]]] = {
        f"{forward} {backward}": partial(fused, forward, backward)
        for forward, backward in itertools.product(FUSED_FORMS, FUSED_FORMS)
    }
    return found | {"library": library_step(problem)}


GRADIENTS = ("dx", "da", "db", "drouter_weight", "drouter_bias")


def library_step(problem: Problem) -> Callable[[], dict[str, Tensor]]:
    """The same by torch's own operators, gates on the narrow side: what a caller without fused kernels would run."""
    x, weight, bias, a, b, router_weight, router_bias, dy, layout = problem
    leaves = [t.detach().requires_grad_() for t in (x, a, b, router_weight, router_bias)]

    def step() -> dict[str, Tensor]:
        x, a, b, router_weight, router_bias = leaves
        h, logits = F.linear(x, torch.cat([a, router_weight])).split([layout.rank_sum, layout.gates], 1)
        gates = (logits.float() + router_bias).softmax(-1).to(x.dtype)
        factor = torch.cat([(gates[:, i : i + 1] * s).expand(-1, r) for i, (r, s) in enumerate(_experts(layout))], 1)
        y = F.linear(x, weight, bias).addmm_(h * factor, b)
        gradients = torch.autograd.grad(y, leaves, dy)
        return {"y": y.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}

    return step


def _experts(layout: RankLayout) -> Iterator[tuple[int, float]]:
    return zip(layout.ranks, layout.scaling, strict=True)


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Every device has this table meanwhile."""
    known = tables.table_of
    tables.table_of = lambda device: table  # type: ignore[assignment]
    try:
        yield
    finally:
        tables.table_of = known


def tiles_as_json(tiles: dict[TileKey, Blocks]) -> list[dict[str, Any]]:
    return [
        {"kernel": kernel, "elements": elements, "below_rows": bucket, **tile._asdict()}
        for (kernel, elements, bucket), tile in tiles.items()
    ]


def forms_as_json(forms: dict[FormKey, Forms]) -> list[dict[str, Any]]:
    names = {dtype: name for name, dtype in tables.DTYPES.items()}
    return [
        {"dtype": names[dtype], "K": K, "O": O, "below_rows": bucket, **winner._asdict()}
        for (dtype, K, O, bucket), winner in forms.items()
    ]


def write(path: Path, content: dict[str, Any]) -> None:
    """One entry a line, so that two tables can be compared; the old file, or the new one, and never half of one."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list):
            entries = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            lines.append(f"  {json.dumps(name)}: [\n{entries}\n  ]")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(unfinished, path)


def _name(tile: Blocks) -> str:
    sides = " x ".join(str(side) for side in (tile.rows, tile.inner, tile.columns) if side)
    return f"{sides}, {tile.warps} warps, {tile.stages} stages" + (", persistent" if tile.persistent else "")


def _shape(text: str) -> tuple[int, int]:
    K, _, O = text.partition(",")
    return int(K), int(O)


def _smaller(candidates: list[Blocks]) -> list[Blocks]:
    """fp32 elements are twice as wide: half the inner side."""
    return [c._replace(inner=max(16, c.inner // 2)) for c in candidates if not c.persistent]


if __name__ == "__main__":
    main()
