"""What a Mixture-of-Ranks linear costs on one CPU thread, as a multiple of the frozen linear it adapts.

Four layers of ViT-B in fp32, where x and the adapter require grad and W is frozen: the default MoRLinear, the same
layer as a loop over its experts, and peft's LoRA r=8, all three around one and the same nn.Linear. In every round each
of them runs once, in shuffled order, and is divided by the frozen linear of that round, so that what slows the machine
down for a while slows both. Time is CPU time of the thread, which waiting for a core does not count in.

    python benchmarks/bench_mor_linear_cpu.py --rounds 60 --out benchmarks/results

Every output and gradient is first compared with a float64 loop; no time is taken before all of them agree.

Shapes: T rows (all tokens), K in, O out.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from harness import LORA_RANK, Errors, draw_inputs, kept_bytes
from torch import Tensor, nn

from mor import MoRConfig, MoRLinear

LAYERS = {"fc1": (768, 3072), "fc2": (3072, 768), "qkv": (768, 2304), "proj": (768, 768)}  # ViT-B: (K, O)
MODES = ("forward", "forward_backward")
TOLERANCE = 1e-5  # |got - expected| / |expected|, Frobenius, in fp32
WARM_UP_ROUNDS = 2

Times = dict[str, dict[str, np.ndarray]]  # seconds of CPU by provider and mode, (rounds,)


class Target(NamedTuple):
    """The median of the default MoR layer's time divided by the rival's, both of the same round, is at most limit."""

    layer: str
    mode: str
    rival: str
    limit: float


TARGETS = (
    Target("fc1", "forward", "frozen", 1.15),
    Target("fc1", "forward_backward", "frozen", 1.20),
    Target("fc2", "forward", "peft_lora", 1.00),
    Target("fc2", "forward_backward", "peft_lora", 1.00),
)

NAMES = {
    "frozen": "frozen linear",
    "mor": "MoR (default)",
    "mor_eager": "MoR, loop over experts",
    "peft_lora": f"peft LoRA r={LORA_RANK}",
}

EXPECTED = {
    "frozen": harness.expected_frozen,
    "mor": harness.expected_mor,
    "mor_eager": harness.expected_mor,
    "peft_lora": harness.expected_lora,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print, and say of every target whether it is met."""
    parser = argparse.ArgumentParser(description="CPU time of a Mixture-of-Ranks linear beside the frozen linear.")
    parser.add_argument("--rounds", type=int, default=60, help="how often everything is timed (default: 60)")
    parser.add_argument("--rows", type=int, default=1576, help="tokens, T (default: 1576, 8 images of 197)")
    parser.add_argument("--out", type=Path, help="folder for cpu_mor_linear.json and .md (default: none is written)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.rows < 1:
        parser.error(f"--rounds and --rows must be at least 1, got {options.rounds} and {options.rows}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = measure(options.rows, options.rounds)
    finally:
        torch.set_num_threads(threads)
    text = report(result)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "cpu_mor_linear.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.out / "cpu_mor_linear.md").write_text(f"# MoR linear on the CPU\n\n{text}\n")


def measure(rows: int, rounds: int) -> dict[str, Any]:
    """Everything that is stored: the set-up, each layer's errors, bytes, times and ratios, and the targets."""
    setup = {
        **harness.setup(("torch", "peft", "numpy")),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "rows": rows,
        "rounds": rounds,
        "clock": "time.thread_time",
        "load_average_before": os.getloadavg(),
    }
    layers = {name: build_layers(*shape) for name, shape in LAYERS.items()}
    inputs = {name: draw_inputs(rows, *shape) for name, shape in LAYERS.items()}
    errors = {name: accuracy(providers, *inputs[name]) for name, providers in layers.items()}
    check_accuracy(errors)

    measured, times = {}, {}
    for name, providers in layers.items():
        print(f"{name}: {rounds} rounds", file=sys.stderr)
        x, dy = inputs[name]
        times[name] = time_providers(providers, x, dy, rounds)
        measured[name] = {
            "in_features": x.shape[1],
            "out_features": dy.shape[1],
            "frozen_ms": {mode: _quantiles(1e3 * times[name]["frozen"][mode]) for mode in MODES},
            "ratio_to_frozen": {
                provider: {mode: _quantiles(_ratio(times[name], provider, "frozen", mode)) for mode in MODES}
                for provider in providers
            },
            "kept_bytes_per_token": {provider: kept_bytes(layer, x) / rows for provider, layer in providers.items()},
            "relative_error": errors[name],
        }
    return {
        **setup,
        "load_average_after": os.getloadavg(),
        "tolerance": TOLERANCE,
        "layers": measured,
        "targets": [judge(target, times[target.layer]) for target in TARGETS],
    }


def build_layers(in_features: int, out_features: int) -> dict[str, nn.Module]:
    """The frozen linear and what is built around it."""
    base = harness.frozen_linear(in_features, out_features)
    config = MoRConfig()
    layers = harness.mor_layers(
        {"mor": lambda: MoRLinear(base, config), "mor_eager": lambda: MoRLinear(base, config, backend="eager")}
    )
    return {"frozen": base, **layers, "peft_lora": harness.lora_layer(base)}


def accuracy(providers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> dict[str, Errors]:
    """Relative errors by provider and tensor."""
    return {
        name: harness.errors_of(layer, x, dy, harness.exact(EXPECTED[name], layer, x, dy))
        for name, layer in providers.items()
    }


def check_accuracy(errors: dict[str, dict[str, Errors]]) -> None:
    """Stop with a sentence for each tensor that is off, before any time is taken."""
    red = [
        f"{layer}, {NAMES[provider]}: {tensor} is off by {error:.1e} relative to float64, tolerance {TOLERANCE:.0e}"
        for layer, providers in errors.items()
        for provider, tensors in providers.items()
        for tensor, error in tensors.items()
        if not error <= TOLERANCE  # so that NaN is red, too
    ]
    if red:
        raise SystemExit("\n".join([*red, "No speed is measured while results are wrong."]))


def time_providers(providers: dict[str, nn.Module], x: Tensor, dy: Tensor, rounds: int) -> Times:
    """Seconds of CPU by provider and mode, one per round; the order is shuffled anew in every round."""
    times: dict[str, dict[str, list[float]]] = {provider: {mode: [] for mode in MODES} for provider in providers}
    order, shuffle = list(providers), random.Random(0).shuffle
    for round_number in range(WARM_UP_ROUNDS + rounds):
        shuffle(order)
        for provider in order:
            seconds = time_once(providers[provider], x, dy)
            if round_number >= WARM_UP_ROUNDS:
                for mode in MODES:
                    times[provider][mode].append(seconds[mode])
    return {provider: {mode: np.array(times[provider][mode]) for mode in MODES} for provider in providers}


def time_once(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Seconds of CPU of one forward, and of it and the backward that follows."""
    x.grad = None
    layer.zero_grad()
    start = time.thread_time()
    y = layer(x)
    middle = time.thread_time()
    y.backward(dy)
    return {"forward": middle - start, "forward_backward": time.thread_time() - start}


def judge(target: Target, times: Times) -> dict[str, Any]:
    """The target's fields, its median over the rounds, and whether it is met."""
    median = float(np.median(_ratio(times, "mor", target.rival, target.mode)))
    return {**target._asdict(), "median": round(median, 4), "met": median <= target.limit}


def report(result: dict[str, Any]) -> str:
    """The set-up in a sentence, a table in Markdown, and a sentence for each target."""
    versions, git = result["versions"], result["git"]
    before, after = (result[f"load_average_{when}"][0] for when in ("before", "after"))
    lines = [
        f"{result['rows']} tokens, fp32, {result['threads']} thread, {result['rounds']} rounds. "
        "CPU time divided by that of the frozen linear in the same round: median (20 % quantile, 80 % quantile).",
        "",
        f"{result['cpu']}, torch {versions['torch']}, peft {versions['peft']}, commit {git['commit'][:12]}"
        f"{' with changes to mor' if git['code_changed'] else ''}. "
        f"Load average {before:.1f} before and {after:.1f} after, on {result['cores']} cores"
        # The benchmark itself is a load of one.
        f"{': the machine was busy with other work' if max(before, after) > 1.5 else ''}.",
        "",
        "| layer | | forward | forward + backward | kept for backward, bytes per token | worst relative error |",
        "|---|---|---|---|---|---|",
    ]
    for name, layer in result["layers"].items():
        milliseconds = [f"{layer['frozen_ms'][mode]['median']:.1f} ms" for mode in MODES]
        for provider, ratios in layer["ratio_to_frozen"].items():
            cells = milliseconds if provider == "frozen" else [_spread(ratios[mode]) for mode in MODES]
            kept, error = layer["kept_bytes_per_token"][provider], max(layer["relative_error"][provider].values())
            shape = f"{name} ({layer['in_features']} -> {layer['out_features']})" if provider == "frozen" else ""
            lines.append(f"| {shape} | {NAMES[provider]} | {' | '.join(cells)} | {kept:,.0f} | {error:.1e} |")
    lines += ["", *(_verdict(target) for target in result["targets"])]
    return "\n".join(lines)


def _verdict(target: dict[str, Any]) -> str:
    mode = "forward" if target["mode"] == "forward" else "forward + backward"
    return (
        f"- {target['layer']}, {mode}: MoR takes {target['median']:.3f} times as long as the {NAMES[target['rival']]}; "
        f"the target is at most {target['limit']:.2f}: {'met' if target['met'] else 'NOT met'}."
    )


def _ratio(times: Times, provider: str, rival: str, mode: str) -> np.ndarray:
    return times[provider][mode] / times[rival][mode]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.2, 0.5, 0.8])
    return {"median": round(float(median), 4), "q20": round(float(low), 4), "q80": round(float(high), 4)}


def _spread(quantiles: dict[str, float]) -> str:
    return f"{quantiles['median']:.3f} ({quantiles['q20']:.3f}, {quantiles['q80']:.3f})"


if __name__ == "__main__":
    main()
