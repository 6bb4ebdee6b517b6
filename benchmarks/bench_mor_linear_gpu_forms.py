"""What a Mixture-of-Ranks linear costs on a GPU, as a multiple of the frozen linear it adapts, form by form.

    PYTHONPATH=.:kernels python benchmarks/bench_mor_linear_gpu_forms.py --out benchmarks/results

The four linears of a ViT block, with x and the adapter requiring grad and W frozen: the naive loop over experts, the
same under torch.compile, the concatenated form in PyTorch, peft's LoRA r=8, and the fused operators of mor_kernels in
both their forms. All providers of one linear are timed in turn, round after round, in one process. In "graph" mode
each call is a CUDA graph, replayed on a cold L2 cache; in "eager" mode the time includes what Python needs to launch.

Every output and gradient is first compared with a float64 loop. A fused form passes if none of its errors exceeds 1.25
times the naive loop's in the same dtype; a form that does not pass gets no time.

    ... --device cpu --blocks tiny --rows 40     tries the whole path in Triton's interpreter; its times mean nothing

Shapes: T rows (all tokens), K in, O out, R sum of ranks.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = {
    "ViT-B": {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)},
    "ViT-L": {"qkv": (1024, 3072), "proj": (1024, 1024), "fc1": (1024, 4096), "fc2": (4096, 1024)},
    "tiny": {"fc1": (24, 40), "fc2": (40, 24)},
}
RANKS, SCALING = (2, 4, 8), (2.0, 2.0, 2.0)
LORA_RANK = 8
MODES = ("forward, no grad", "forward", "forward + backward")
FUSED = ("branch", "tail")
REPOSITORY = Path(__file__).resolve().parents[1]

Tensors = dict[str, Tensor]
Forward = Callable[[Tensor], Tensor]


def draw(rows: int, width: int, out: int, dtype: torch.dtype, device: str) -> Tensors:
    """Random data of ordinary size; nothing is zero, so nothing unwritten or unread can hide."""
    generator = torch.Generator(device).manual_seed(rows + width + out)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    rank_sum = sum(RANKS)
    trained = {
        "A": normal(rank_sum, width, scale=width**-0.5),
        "B": normal(rank_sum, out, scale=0.3 * rank_sum**-0.5),
        "router_weight": normal(len(RANKS) + 1, width, scale=width**-0.5),
        "router_bias": normal(len(RANKS) + 1, scale=0.5),
    }
    return {
        "x": normal(rows, width, scale=1.0).requires_grad_(),
        "weight": normal(out, width, scale=width**-0.5),
        "bias": normal(out, scale=0.1),
        "dy": normal(rows, out, scale=1.0),
        **{name: t.requires_grad_() for name, t in trained.items()},
    }


def naive(x, weight, bias, A, B, router_weight, router_bias):
    """y = x W^T + b + sum_i gate_i s_i (x A_i^T) B_i, one expert after the other."""
    y = F.linear(x, weight, bias)
    # The softmax is in fp32 and the gate is cast back, or it would make every (T, O) product fp32.
    gates = F.linear(x, router_weight, router_bias).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    gates = gates.to(x.dtype)
    start = 0
    for i, rank in enumerate(RANKS):
        own = slice(start, start + rank)
        y = y + gates[:, i : i + 1] * SCALING[i] * (x @ A[own].T @ B[own])
        start += rank
    return y


def concatenated(x, weight, bias, A, B, router_weight, router_bias):
    """The same with the gates on the narrow side, so that only one product is as wide as y."""
    z = F.linear(x, torch.cat([A, router_weight]))
    gates = (z[:, len(A) :] + router_bias).softmax(-1, dtype=torch.float32).to(x.dtype)
    columns = [gates[:, i : i + 1] * s for i, s in enumerate(SCALING)]
    factor = torch.cat([c.expand(-1, rank) for c, rank in zip(columns, RANKS, strict=True)], 1)
    return F.linear(x, weight, bias).addmm_(z[:, : len(A)] * factor, B)


def providers(tensors: Tensors, with_compiled: bool, with_peft: bool) -> dict[str, Forward]:
    """x -> y by name, all around the same frozen weight."""
    weight, bias = tensors["weight"], tensors["bias"]
    adapter = [tensors[name] for name in ("A", "B", "router_weight", "router_bias")]
    found: dict[str, Forward] = {
        "frozen": lambda x: F.linear(x, weight, bias),
        "naive": lambda x: naive(x, weight, bias, *adapter),
        "concatenated": lambda x: concatenated(x, weight, bias, *adapter),
    }
    if with_compiled:
        compiled = torch.compile(naive, dynamic=False)
        found["naive, compiled"] = lambda x: compiled(x, weight, bias, *adapter)
    if with_peft:
        found[f"peft LoRA r={LORA_RANK}"] = peft_lora(tensors)

    import mor_kernels

    for form in FUSED:
        found[form] = lambda x, form=form: mor_kernels.mor_linear(
            x, weight, bias, *adapter, ranks=RANKS, scaling=SCALING, bypass=True, form=form
        )
    return found


def peft_lora(tensors: Tensors) -> Forward:
    import peft

    weight, bias = tensors["weight"], tensors["bias"]
    linear = torch.nn.Linear(*reversed(weight.shape), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer


def gradients(forward: Forward, tensors: Tensors) -> Tensors:
    """y and the gradient of every leaf that has one, by name."""
    for t in tensors.values():
        t.grad = None
    y = forward(tensors["x"])
    y.backward(tensors["dy"])
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in tensors.items() if t.grad is not None}


def accuracy(forms: dict[str, Forward], tensors: Tensors) -> dict[str, dict[str, float]]:
    """Relative Frobenius error against the loop in float64 on the same rounded inputs, by form and tensor."""
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    order = ("weight", "bias", "A", "B", "router_weight", "router_bias")
    expected = gradients(lambda x: naive(x, *(exact[name] for name in order)), exact)
    errors: dict[str, dict[str, float]] = {}
    for form, forward in forms.items():
        got = gradients(forward, tensors)
        errors[form] = {
            name: float(((got[name].double() - value).norm() / value.norm()).nan_to_num(nan=torch.inf))
            for name, value in expected.items()
        }
    return errors


def same_bits(forward: Forward, tensors: Tensors, runs: int = 10) -> bool:
    first = {name: t.clone() for name, t in gradients(forward, tensors).items()}
    for _ in range(runs - 1):
        again = gradients(forward, tensors)
        if not all(torch.equal(first[name], again[name]) for name in first):
            return False
    return True


def call(forward: Forward, tensors: Tensors, mode: str) -> Callable[[], None]:
    x, dy = tensors["x"], tensors["dy"]
    # Gradients for x and for what this provider trains: LoRA brings its own matrices, the others share the adapter.
    own = forward.parameters() if isinstance(forward, torch.nn.Module) else tensors.values()
    trained = [t for t in own if t.requires_grad and t is not x]

    def without_grad() -> None:
        with torch.no_grad():
            forward(x)

    def with_grad() -> None:
        forward(x)

    def there_and_back() -> None:
        torch.autograd.grad(forward(x), [x, *trained], dy, allow_unused=True)

    return dict(zip(MODES, (without_grad, with_grad, there_and_back), strict=True))[mode]


def captured(function: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def in_turn(calls: dict[str, Callable[[], None]], seconds: float, cold: bool, device: str) -> dict[str, list[float]]:
    """Microseconds by name as [median, 20 % quantile, 80 % quantile], all calls taking turns.

    cold: fill the L2 cache with something else before each call. Otherwise wait for the card before each call, so that
    the time it takes to launch counts too.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if cold else None
    for function in calls.values():
        for _ in range(3):
            function()
    until = time.perf_counter() + seconds
    while len(times[next(iter(calls))]) < 10 or time.perf_counter() < until:
        marks = []
        for name, function in calls.items():
            if device == "cpu":
                start = time.perf_counter()
                function()
                times[name].append(1e6 * (time.perf_counter() - start))
                continue
            if flush is not None:
                flush.zero_()
            else:
                torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            marks.append((name, begin, end))
        if device == "cuda":
            torch.cuda.synchronize()
            for name, begin, end in marks:
                times[name].append(1e3 * begin.elapsed_time(end))
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return {name: torch.quantile(torch.tensor(t, dtype=torch.float64), quantiles).tolist() for name, t in times.items()}


def peak_memory(function: Callable[[], None]) -> int:
    """Bytes allocated at the worst moment, above what was there before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compilations_when_rows_vary(device: str) -> int:
    """Kernels compiled for numbers of rows never seen before, after one warm-up on each side of the table."""
    import triton

    from mor_kernels.blocks import SMALL_ROWS

    def run(rows: int) -> None:
        tensors = draw(rows, 128, 256, torch.bfloat16, device)
        for form in FUSED:
            gradients(providers(tensors, False, False)[form], tensors)

    for rows in (512, SMALL_ROWS):
        run(rows)
    count = 0

    def compiled(*args, **kwargs) -> None:
        nonlocal count
        count += 1

    triton.knobs.runtime.jit_post_compile_hook = compiled
    try:
        for rows in (1, 16, 17, 1000, 1576, SMALL_ROWS - 1, SMALL_ROWS + 1, 6288, 12608):
            run(rows)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    return count


def environment(device: str) -> dict:
    import triton

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", REPOSITORY, *arguments], capture_output=True, text=True).stdout.strip()

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton's interpreter: times mean nothing",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": os.environ.get("GIT_COMMIT") or git("rev-parse", "HEAD") or "unknown",
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", default=["ViT-B"], choices=BLOCKS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1576, 6288, 12608, 65536])
    parser.add_argument("--modes", nargs="+", default=[MODES[0], MODES[2]], choices=MODES)
    parser.add_argument("--launch", nargs="+", default=["graph", "eager"], choices=["graph", "eager"])
    parser.add_argument("--skip", nargs="*", default=[], help="providers to leave out")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each linear, mode and way to launch")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    device = options.device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        options.launch, options.dtype = ["eager"], "float16"
    result: dict = {"environment": environment(device), "dtype": options.dtype, "linears": [], "blocks": []}
    print(json.dumps(result["environment"]))
    if device == "cuda":
        result["compilations_when_rows_vary"] = compilations_when_rows_vary(device)
        print(f"compiled anew when the number of rows varied: {result['compilations_when_rows_vary']}")

    dtype = getattr(torch, options.dtype)
    for block in options.blocks:
        for rows in options.rows:
            total: dict[str, dict[str, float]] = {}
            failed: set[str] = set()
            for linear, (width, out) in BLOCKS[block].items():
                tensors = draw(rows, width, out, dtype, device)
                # A new number of rows would only test torch.compile's cache limit.
                torch._dynamo.reset()
                forms = providers(tensors, device == "cuda", device == "cuda" and "peft" not in options.skip)
                forms = {name: f for name, f in forms.items() if name not in options.skip}
                checked = {name: f for name, f in forms.items() if name != "frozen" and not name.startswith("peft")}
                errors = accuracy(checked, tensors)
                bad = {
                    name for name in errors
                    if any(not e < 1.0 for e in errors[name].values())
                    or (name in FUSED and any(e > 1.25 * errors["naive"][k] for k, e in errors[name].items()))
                }  # fmt: skip
                bits = {name: same_bits(forms[name], tensors, 10 if device == "cuda" else 2) for name in FUSED}
                bad |= {name for name, equal in bits.items() if not equal}
                failed |= bad
                worst = {n: max(errors[n][k] / errors["naive"][k] for k in errors[n]) for n in FUSED}
                print(
                    f"{block} {linear} T={rows}: worst error over naive's "
                    + ", ".join(f"{n} {w:.2f}" for n, w in worst.items())
                    + f"; same bits {bits}"
                    + (f"; FAILED {sorted(bad)}, not timed" if bad else "")
                )
                forms = {name: f for name, f in forms.items() if name not in bad}
                record: dict = {
                    "block": block, "linear": linear, "rows": rows, "K": width, "O": out,
                    "errors": errors, "same_bits": bits, "failed": sorted(bad), "microseconds": {}, "peak_bytes": {},
                }  # fmt: skip
                for mode in options.modes:
                    calls = {name: call(f, tensors, mode) for name, f in forms.items()}
                    if device == "cuda":
                        record["peak_bytes"][mode] = {name: peak_memory(c) for name, c in calls.items()}
                    for launch in options.launch:
                        ready = {n: captured(c) for n, c in calls.items()} if launch == "graph" else calls
                        times = in_turn(ready, options.seconds, launch == "graph", device)
                        record["microseconds"][f"{mode}, {launch}"] = times
                        for name, (median, _, _) in times.items():
                            way = total.setdefault(f"{mode}, {launch}", {})
                            way[name] = way.get(name, 0.0) + median
                result["linears"].append(record)
                del tensors, forms, checked
            ratios = {
                way: {n: t / times["frozen"] for n, t in times.items() if n not in failed}
                for way, times in total.items()
            }
            summary = {"block": block, "rows": rows, "microseconds": total, "ratios": ratios, "failed": sorted(failed)}
            result["blocks"].append(summary)
            for way, row in ratios.items():
                cells = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row.items() if name != "frozen")
                print(f"{block} whole block T={rows} {way}: frozen {total[way]['frozen']:.0f} us | {cells}", flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                card = "cpu" if device == "cpu" else torch.cuda.get_device_name().split()[-1].lower()
                (options.out / f"mor_linear_gpu_forms_{card}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
