"""What a Mixture-of-Ranks linear costs on a GPU, as a multiple of the frozen linear it adapts.

    python benchmarks/bench_mor_linear.py                                     all of it, planned for eight minutes
    python benchmarks/bench_mor_linear.py --resume --blocks ViT-L             adds to the same result file
    TRITON_INTERPRET=1 python benchmarks/bench_mor_linear.py --device cpu --blocks tiny --rows 40
                                       tries the whole path in Triton's interpreter, where times mean nothing

The four linears of a ViT block, W frozen and in bf16, x and the adapter requiring grad, the adapter in fp32 as
MoRLinear makes it. Providers: the frozen linear, MoRLinear as a loop over its experts, that loop under torch.compile
(one compilation for each linear, with a free number of rows), MoRLinear by its concatenated form, the two fused forms
of mor_kernels, what MoRLinear chooses by itself ("auto"), and peft's LoRA r=8 in bf16.

The linears that the goals are about come first: forward and backward of ViT-B, then its other modes, then ViT-L. The
result file is written anew after each linear, so a run that is killed leaves what it had measured.

All providers of one linear take turns, in an order shuffled anew for every round, on a cold L2 cache; a ratio is to
the frozen linear of the same round. In "graph" each call is a replayed CUDA graph; in "eager" the card waits idle and
the time includes what Python needs to launch. "Whole block" is the sum over its four linears, not a chain of them.

Output and gradients are first compared with float64. MoR's forms may err by 1.25 times what the loop over experts errs
in the same dtypes, tensor by tensor, as a root mean square over several draws of x and dy (the gradient of the router's
bias is four numbers, whose error in one draw is mostly luck), and the fused forms must repeat themselves bit for bit.
What fails gets no time.

Shapes: T rows (all tokens), K in, O out.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from harness import LORA_RANK, draw_inputs, output_and_gradients
from torch import Tensor, nn

import mor
import mor_kernels
from mor import MoRConfig, MoRLinear
from mor.files import write_atomically
from mor_kernels.blocks import ROW_LIMITS
from mor_kernels.measure import captured, in_turn, peak_bytes, quantiles, side_stream, table_in_use
from mor_kernels.reference import TOLERANCE
from mor_kernels.tables import FUSED_FORMS, card, file_name

BLOCKS = {
    "ViT-B": {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)},
    "ViT-L": {"qkv": (1024, 3072), "proj": (1024, 1024), "fc1": (1024, 4096), "fc2": (4096, 1024)},
    "tiny": {"fc1": (24, 40), "fc2": (40, 24)},
}
NAMES = {
    "frozen": "frozen linear",
    "naive": "MoR, loop over experts",
    "compiled": "the loop, torch.compile",
    "concat": "MoR, concatenated",
    "peft": f"peft LoRA r={LORA_RANK}",
    "branch": "MoR, fused: branch",
    "tail": "MoR, fused: tail",
    "auto": "MoR (default)",
}
HELD_TO_NAIVE = ("concat", *FUSED_FORMS, "auto")  # errs by at most ERROR_LIMIT times the loop's error
REPEATABLE = (*FUSED_FORMS, "auto")
ERROR_LIMIT = 1.25
FP32_FLOOR = 1e-5  # below this an error in fp32 is rounding, whatever the loop's luck was
EXPECTED = {"frozen": harness.expected_frozen, "peft": harness.expected_lora}  # all others: the MoR linear
MODES = ("no_grad_forward", "forward", "backward", "forward_backward")
AIM = "forward_backward"  # what the targets are about
LAUNCHES = ("graph", "eager")
# Many, 64 images of 197 tokens, 8 of them, and 8 of 786 (the paper's batch): those with goals first.
ROWS = (65536, 12608, 1576, 6288)
RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]


class Target(NamedTuple):
    """The block's time, provider's over rival's, forward and backward, is at most (or at least) the limit."""

    what: str
    provider: str
    rival: str
    rows: int
    launches: tuple[str, ...]
    limit: float
    at_least: bool = False


TARGETS = (
    Target("ViT-B block at 65,536 rows, over frozen", "auto", "frozen", 65536, LAUNCHES, 1.35),
    Target("ViT-B block at 12,608 rows, over frozen", "auto", "frozen", 12608, LAUNCHES, 1.45),
    Target("ViT-B block at 1,576 rows in a graph, over frozen", "auto", "frozen", 1576, ("graph",), 1.8),
    Target("the loop over experts at 65,536 rows, over MoR", "naive", "auto", 65536, LAUNCHES, 5.0, at_least=True),
    *(
        Target(f"ViT-B block at {rows:,} rows, over one peft LoRA", "auto", "peft", rows, launches, 1.0)
        for rows, launches in ((1576, ("graph",)), (6288, LAUNCHES), (12608, LAUNCHES), (65536, LAUNCHES))
    ),
)


class FusedLinear(MoRLinear):
    """A MoRLinear that always takes one fused form."""

    def __init__(self, base: nn.Linear, config: MoRConfig, form: str) -> None:
        super().__init__(base, config)
        self.form = form

    def forward(self, input: Tensor) -> Tensor:
        router = self.mor_router
        assert router is not None
        return mor_kernels.mor_linear(
            input, self.base.weight, self.base.bias, self.mor_A, self.mor_B, router.weight, router.bias,
            ranks=self.config.ranks, scaling=self.config.scaling, bypass=self.config.bypass, form=self.form,
        )  # fmt: skip


def build_layers(K: int, O: int, options: argparse.Namespace) -> dict[str, nn.Module]:
    """All providers around one frozen linear, by name."""
    dtype, config = getattr(torch, options.dtype), MoRConfig()
    base = harness.frozen_linear(K, O, dtype=dtype, device=options.device)
    makers: dict[str, Callable[[], MoRLinear]] = {
        "naive": lambda: MoRLinear(base, config, backend="eager"),
        "compiled": lambda: MoRLinear(base, config, backend="eager"),
        "concat": lambda: MoRLinear(base, config, backend="concat"),
        "branch": lambda: FusedLinear(base, config, "branch"),
        "tail": lambda: FusedLinear(base, config, "tail"),
        "auto": lambda: MoRLinear(base, config),
    }
    wanted = {"naive", *options.providers}  # the loop is also what errors are held to
    mor_layers = harness.mor_layers({name: make for name, make in makers.items() if name in wanted})
    if options.parameters != "float32":
        for layer in mor_layers.values():
            layer.to(getattr(torch, options.parameters))
    layers: dict[str, nn.Module] = {"frozen": base, **mor_layers}
    if "peft" in options.providers:
        layers["peft"] = harness.lora_layer(base)
    if "compiled" in layers:
        layers["compiled"].compile(backend="inductor" if options.device == "cuda" else "aot_eager")
    return layers


def check(
    layers: Mapping[str, nn.Module], inputs: Callable[[int], tuple[Tensor, Tensor]], draws: int, runs: int
) -> Result:
    """Errors against float64, whether the bits repeat over `runs`, and why a provider may not be timed."""
    squares: dict[str, dict[str, list[float]]] = {name: {} for name in layers}
    refused: dict[str, str] = {}
    for x, dy in map(inputs, range(draws)):
        expected = {}
        for name, layer in layers.items():
            function = EXPECTED.get(name, harness.expected_mor)
            if function not in expected:
                expected[function] = harness.exact(function, layer, x, dy)
            try:
                for tensor, error in harness.errors_of(layer, x, dy, expected[function]).items():
                    squares[name].setdefault(tensor, []).append(error**2)
            except Exception as error:  # a provider that cannot run leaves the others their times
                refused[name] = _first_line(error)
    errors = {
        name: {tensor: (sum(values) / draws) ** 0.5 for tensor, values in found.items()}
        for name, found in squares.items()
        if name not in refused
    }
    bits = {name: same_bits(layers[name], x, dy, runs) for name in REPEATABLE if name in errors}
    for name in errors:
        reason = wrong(name, errors, x.dtype) or ("" if bits.get(name, True) else "two runs gave different bits")
        if reason:
            refused[name] = reason
    naive = errors["naive"]
    worst = {
        name: max(errors[name][tensor] / naive[tensor] for tensor in naive) for name in HELD_TO_NAIVE if name in errors
    }
    return {"errors": errors, "worst_error_over_naive": worst, "same_bits": bits, "refused": refused}


def wrong(name: str, errors: Mapping[str, harness.Errors], dtype: torch.dtype) -> str | None:
    """The first tensor that is off by more than it may be, in a sentence."""
    for tensor, error in errors[name].items():
        limit = TOLERANCE[dtype]
        if name in HELD_TO_NAIVE:
            floor = FP32_FLOOR if dtype == torch.float32 else 0.0
            limit = min(limit, max(floor, ERROR_LIMIT * errors["naive"][tensor]))
        if not error <= limit:  # so that NaN is wrong, too
            return f"{tensor} is off by {error:.1e} relative to float64, at most {limit:.1e} is allowed"
    return None


def same_bits(layer: nn.Module, x: Tensor, dy: Tensor, runs: int) -> bool:
    parameters = dict(layer.named_parameters())
    first = output_and_gradients(layer, x, dy, parameters)
    for _ in range(runs - 1):
        again = output_and_gradients(layer, x, dy, parameters)
        if not all(torch.equal(first[name], again[name]) for name in first):
            return False
    return True


def calls_of(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    """One call of each mode."""
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    @torch.no_grad()
    def no_grad_forward() -> Tensor:
        return layer(x)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), trained, dy)

    graph: list[Tensor] = []  # of the one forward that all backwards go through

    def backward() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(layer(x))
        return torch.autograd.grad(graph[0], trained, dy, retain_graph=True)

    return dict(zip(MODES, (no_grad_forward, lambda: layer(x), backward, forward_backward), strict=True))


def missing(
    record: Result, layers: Mapping[str, nn.Module], modes: Sequence[str], options: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """The modes and ways to launch in which somebody has neither a time nor a reason to have none."""
    for mode, launch in product(modes, options.launches):
        way = f"{mode}, {launch}"
        settled = {*record["refused"], *record["times"].get(way, {}), *record["not_measured"].get(way, {})}
        if not {"frozen", *options.providers} & layers.keys() <= settled:
            yield mode, launch


def measure_linear(
    record: Result,
    layers: Mapping[str, nn.Module],
    x: Tensor,
    dy: Tensor,
    modes: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Add times and peak memory to the record of one linear, for what is not in it yet."""
    timed = [name for name in layers if name == "frozen" or name in options.providers]
    timed = [name for name in timed if name not in record["refused"]]
    for mode, launch in list(missing(record, layers, modes, options)):
        way = f"{mode}, {launch}"
        times, not_measured = record["times"].setdefault(way, {}), record["not_measured"].setdefault(way, {})
        ready = {}
        for name in timed:
            call = calls_of(layers[name], x, dy)[mode]
            try:
                if options.device == "cuda":
                    record["peak_bytes"].setdefault(mode, {})[name] = peak_bytes(call)
                ready[name] = captured(call) if launch == "graph" else call
            except Exception as error:  # out of memory, or not to be captured: the others go on
                not_measured[name] = _first_line(error)
        if "frozen" in ready:
            least = 10 if options.device == "cuda" else 1
            raw = in_turn(ready, options.seconds, launches_count=launch == "eager", device=options.device, least=least)
            times.update({name: _ratios(raw, name) for name in ready})


def _ratios(raw: Mapping[str, list[float]], name: str) -> Result:
    frozen = quantiles(raw["frozen"])
    ratio = quantiles([t / f for t, f in zip(raw[name], raw["frozen"], strict=True)])
    return {"microseconds": quantiles(raw[name]), "frozen_microseconds": frozen[0], "ratio": ratio}


def compilations_when_rows_vary(device: str) -> int:
    """Kernels compiled for numbers of rows never seen before, after one warm-up in each bucket of the tables."""
    import triton

    base = harness.frozen_linear(128, 256, dtype=torch.bfloat16, device=device)
    layers = [FusedLinear(base, MoRConfig(), form).to(device) for form in FUSED_FORMS]

    def run(rows: int) -> None:
        x, dy = draw_inputs(rows, 128, 256, dtype=torch.bfloat16, device=device)
        for layer in layers:
            output_and_gradients(layer, x, dy, dict(layer.named_parameters()))

    for rows in (512, *ROW_LIMITS):
        run(rows)
    count = 0

    def compiled(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1

    triton.knobs.runtime.jit_post_compile_hook = compiled
    try:
        for rows in (1, 16, 17, 1000, 1576, *(limit + d for limit in ROW_LIMITS for d in (-1, 1)), 6288, 12608, 65536):
            run(rows)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    return count


def summarise(result: Result) -> None:
    """Add what follows from the linears: the blocks' sums, and what became of every target."""
    result["blocks"] = [
        block
        for name, rows in sorted({(linear["block"], linear["rows"]) for linear in result["linears"]})
        for block in sums(result, name, rows)
    ]
    result["targets"] = [judge(target, result) for target in TARGETS] + judge_results(result)


def sums(result: Result, block: str, rows: int) -> Iterator[Result]:
    """The four linears together: microseconds and ratio to frozen, of every provider that has all of them."""
    linears = [linear for linear in result["linears"] if (linear["block"], linear["rows"]) == (block, rows)]
    if {linear["linear"] for linear in linears} != BLOCKS[block].keys():
        return
    for mode, launch in product(MODES, LAUNCHES):
        way = f"{mode}, {launch}"
        if not any(way in linear["times"] for linear in linears):
            continue
        parts = [linear["times"].get(way, {}) for linear in linears]
        complete = [name for name in NAMES if all(name in part for part in parts)]
        total = {name: sum(part[name]["microseconds"][0] for part in parts) for name in complete}
        frozen = {name: sum(part[name]["frozen_microseconds"] for part in parts) for name in complete}
        yield {
            "block": block, "rows": rows, "mode": mode, "launch": launch, "microseconds": total,
            "ratio": {name: total[name] / frozen[name] for name in complete},
        }  # fmt: skip


def judge(target: Target, result: Result) -> Result:
    """PASS or FAIL by the worst of the ways to launch; NOT MEASURED where one of them is missing."""
    found = []
    for launch, block in product(target.launches, result["blocks"]):
        where, ratio = (block["block"], block["rows"], block["mode"], block["launch"]), block["ratio"]
        here = where == ("ViT-B", target.rows, AIM, launch)
        if here and target.provider in ratio and target.rival in ratio:
            found.append((ratio[target.provider] / ratio[target.rival], launch))
    sign = "at least" if target.at_least else "at most"
    needs = f"{sign} {target.limit:g} ({' and '.join(target.launches)})"
    if len(found) < len(target.launches):
        return {"target": target.what, "needs": needs, "got": None, "verdict": "NOT MEASURED"}
    met = all(value >= target.limit if target.at_least else value <= target.limit for value, _ in found)
    got = ", ".join(f"{value:.3f} ({launch})" for value, launch in found)
    return {"target": target.what, "needs": needs, "got": got, "verdict": "PASS" if met else "FAIL"}


def judge_results(result: Result) -> list[Result]:
    """Errors, bits and compilations: FAIL as soon as one is bad, PASS where ViT-B was seen at every size."""
    linears = [linear for linear in result["linears"] if linear["block"] != "tiny"]
    wanted = {("ViT-B", name, rows) for name in BLOCKS["ViT-B"] for rows in ROWS}
    complete = wanted <= {(linear["block"], linear["linear"], linear["rows"]) for linear in linears}
    worst = [
        (linear["worst_error_over_naive"].get(name, float("inf")), f"{name}, {linear['block']} {linear['linear']}")
        for linear in linears
        for name in REPEATABLE
        if name in linear["providers"]
    ]
    error, where = max(worst, default=(0.0, ""))
    differing = [
        f"{name}, {linear['block']} {linear['linear']} at {linear['rows']:,} rows"
        for linear in linears
        for name, same in linear["same_bits"].items()
        if not same
    ]
    compiled = result["compilations_when_rows_vary"]  # None: not counted
    seen = bool(worst) and complete
    return [
        _verdict(
            "error against float64, over the loop's",
            f"at most {ERROR_LIMIT}",
            f"{error:.3f} ({where})",
            met=error <= ERROR_LIMIT,
            measured=seen,
        ),
        _verdict("equal bits over ten runs", "all", ", ".join(differing) or "all", met=not differing, measured=seen),
        _verdict(
            "kernels compiled anew when the rows vary",
            "0",
            str(compiled),
            met=not compiled,
            measured=compiled is not None,
        ),
    ]


def _verdict(what: str, needs: str, got: str, *, met: bool, measured: bool) -> Result:
    # What failed has failed, however little was measured.
    verdict = "FAIL" if not met else "PASS" if measured else "NOT MEASURED"
    return {"target": what, "needs": needs, "got": None if verdict == "NOT MEASURED" else got, "verdict": verdict}


def report(result: Result) -> str:
    """The blocks' ratios to frozen, a line for each mode and launch, then the targets."""
    lines = []
    for block in result["blocks"]:
        cells = "  ".join(f"{name} {ratio:.2f}" for name, ratio in block["ratio"].items() if name != "frozen")
        frozen = block["microseconds"].get("frozen", float("nan"))
        where = f"{block['block']} block T={block['rows']} {block['mode']}, {block['launch']}"
        lines.append(f"{where}: frozen {frozen:.0f} us | {cells}")
    for target in result["targets"]:
        got = "" if target["got"] is None else f": {target['got']}"
        lines.append(f"{target['verdict']:12} {target['target']}, {target['needs']}{got}")
    return "\n".join(lines)


def plot(result: Result, path: Path) -> None:
    """Bars of forward + backward over frozen: a row of pictures for each block, one for each way to launch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [block for block in result["blocks"] if block["mode"] == AIM]
    blocks = list(dict.fromkeys(block["block"] for block in shown))
    launches = list(dict.fromkeys(block["launch"] for block in shown))
    if not shown:
        return
    figure, axes = pyplot.subplots(
        len(blocks), len(launches), figsize=(7 * len(launches), 3.5 * len(blocks)), squeeze=False, layout="constrained"
    )
    providers = [name for name in NAMES if name != "frozen" and any(name in block["ratio"] for block in shown)]
    width = 0.8 / max(1, len(providers))
    for (i, name), (j, launch) in product(enumerate(blocks), enumerate(launches)):
        axis = axes[i][j]
        cells = [block for block in shown if (block["block"], block["launch"]) == (name, launch)]
        for k, provider in enumerate(providers):
            there = [(n, cell["ratio"][provider]) for n, cell in enumerate(cells) if provider in cell["ratio"]]
            places, ratios = [n + (k - (len(providers) - 1) / 2) * width for n, _ in there], [r for _, r in there]
            bars = axis.bar(places, ratios, width, label=NAMES[provider], color=f"C{k}")
            axis.bar_label(bars, fmt="%.2f", fontsize=6, rotation=90, padding=2)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(yscale="log", xticks=range(len(cells)), xticklabels=[f"{cell['rows']:,} rows" for cell in cells])
        axis.set_title(f"{name} block, forward + backward, {launch}")
        axis.set_ylabel("time over the frozen linears'")
        axis.margins(y=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    setup = result["setup"]
    figure.suptitle(
        f"{setup['gpu']}, torch {setup['versions']['torch']}, {setup['dtype']}, commit {setup['git']['commit'][:12]}"
    )
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", default=["ViT-B", "ViT-L"], choices=BLOCKS)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--providers", nargs="+", default=list(NAMES)[1:], choices=list(NAMES)[1:])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--launches", nargs="+", default=list(LAUNCHES), choices=LAUNCHES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--parameters", default="float32", choices=["bfloat16", "float16", "float32"], help="MoR's own")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing for each linear, mode and launch")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no further linear after this; see --resume")
    parser.add_argument("--resume", action="store_true", help="add what is missing to the result file that is there")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results; on the CPU nothing is written)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu tries the whole path in Triton's interpreter")
    if options.device == "cpu":
        if not mor_kernels.is_available():
            parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment, before Python starts")
        options.launches, options.seconds, options.dtype = ["eager"], 0.0, "float16"  # its bf16 is wrong
    else:
        options.out = options.out or RESULTS
    return options


def setup(options: argparse.Namespace) -> Result:
    packages = [Path(package.__file__).parent for package in (mor, mor_kernels)]
    names = ("torch", "triton", *(["peft"] if "peft" in options.providers else []))
    gpu = card(torch.device(options.device))[0] if options.device == "cuda" else "CPU, interpreter: times mean nothing"
    return {
        "gpu": gpu, "cuda": torch.version.cuda, **harness.setup(names, packages), "dtype": options.dtype,
        "parameters": options.parameters, "block": "sum of its linears", "table": table_in_use(gpu),
    }  # fmt: skip


def begin(options: argparse.Namespace, path: Path | None) -> Result:
    """An empty result, or with --resume the one that is there, if it was made by the same code on the same machine."""
    fresh: Result = {"setup": setup(options), "compilations_when_rows_vary": None, "linears": []}
    if not (options.resume and path and path.exists()):
        return fresh
    known = json.loads(path.read_text())
    here, there = _identity(fresh["setup"]), _identity(known["setup"])
    for field, value in here.items():
        if value != there.get(field):
            raise SystemExit(
                f"--resume: {path} was measured with {field} {there.get(field)!r}, this is {value!r}; "
                "move it away, or leave --resume out to replace it"
            )
    return known


def _identity(setup: Result) -> Result:
    """What must be the same for two runs to share a file; not what lies beside the code, such as the file itself."""
    git = {field: value for field, value in setup["git"].items() if field != "tree_changed"}
    return json.loads(json.dumps({**setup, "git": git}))


@contextmanager
def settings_of_torch() -> Iterator[None]:
    """Room for one compilation of each linear and mode, and compiled backwards that can run more than once."""
    import torch._functorch.config

    with (
        torch._dynamo.config.patch(recompile_limit=64),
        torch._functorch.config.patch(donated_buffer=False),
    ):
        yield


def main(arguments: Sequence[str] | None = None) -> Result:
    """Check, measure, print, and say of every target whether it is met."""
    started = time.monotonic()
    options = parse(arguments)
    path = options.out / f"{file_name(_short(options))[:-5]}_mor_linear.json" if options.out else None
    result = begin(options, path)
    print(json.dumps(result["setup"]), file=sys.stderr)
    with settings_of_torch(), side_stream() if options.device == "cuda" else nullcontext():
        if options.device == "cuda" and result["compilations_when_rows_vary"] is None:
            try:
                result["compilations_when_rows_vary"] = compilations_when_rows_vary(options.device)
            except Exception as error:  # a form that cannot run leaves the other its times
                print(f"compilations when the rows vary were not counted: {_first_line(error)}", file=sys.stderr)
        built: dict[tuple[str, str], dict[str, nn.Module]] = {}
        for block, modes, rows, linear in plan(options):
            if time.monotonic() - started > 60 * options.minutes:
                what = f"{block} {linear} T={rows} {', '.join(modes)}"
                print(f"out of time before {what}; --resume goes on", file=sys.stderr)
                break
            if (block, linear) not in built:
                built[block, linear] = build_layers(*BLOCKS[block][linear], options)
            measure_cell(result, block, linear, rows, built[block, linear], modes, options)
            summarise(result)
            save(result, path)
            done = f"{block} {linear} T={rows} {', '.join(modes)}"
            print(f"{time.monotonic() - started:.0f} s: {done}", file=sys.stderr)
    summarise(result)
    print(report(result))
    if path:
        plot(result, path)
    return result


def plan(options: argparse.Namespace) -> Iterator[tuple[str, list[str], int, str]]:
    """Block, modes, rows and linear of what is measured together, what the goals are about first."""
    aims = [mode for mode in options.modes if mode == AIM]
    others = [mode for mode in options.modes if mode != AIM]
    for block, modes, rows in product(options.blocks, [aims, others], options.rows):
        for linear in BLOCKS[block] if modes else ():
            yield block, modes, rows, linear


def measure_cell(
    result: Result,
    block: str,
    linear: str,
    rows: int,
    layers: Mapping[str, nn.Module],
    modes: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Check one linear at one number of rows, unless that is done, and time it, into its record."""
    K, O = BLOCKS[block][linear]

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        x, dy = draw_inputs(rows, K, O, seed=seed, dtype=getattr(torch, options.dtype), device=options.device)
        torch._dynamo.mark_dynamic(x, 0)  # one compilation serves every number of rows
        return x, dy

    records = [r for r in result["linears"] if (r["block"], r["linear"], r["rows"]) == (block, linear, rows)]
    if not records:
        records = [
            {"block": block, "linear": linear, "rows": rows, "K": K, "O": O, "providers": [],
             "errors": {}, "worst_error_over_naive": {}, "same_bits": {}, "refused": {},
             "times": {}, "peak_bytes": {}, "not_measured": {}}
        ]  # fmt: skip
        result["linears"] += records
    (record,) = records
    if not list(missing(record, layers, modes, options)):
        return
    if not layers.keys() <= record["errors"].keys() | record["refused"].keys():
        draws, runs = (16, 10) if options.device == "cuda" else (8, 2)
        for field, found in check(layers, inputs, draws, runs).items():
            record[field] |= found
        record["providers"] = [name for name in NAMES if name in {*record["providers"], *layers}]
        for name, reason in record["refused"].items():
            print(f"{block} {linear} T={rows}: {NAMES[name]} gets no time: {reason}")
            for times in record["times"].values():  # of an earlier run, in which it was found right
                times.pop(name, None)
    measure_linear(record, layers, *inputs(0), modes, options)


def save(result: Result, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def _short(options: argparse.Namespace) -> str:
    return "cpu interpreted" if options.device == "cpu" else card(torch.device("cuda"))[0]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]


if __name__ == "__main__":
    main()
