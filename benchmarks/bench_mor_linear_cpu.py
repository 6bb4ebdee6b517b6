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
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mor
from mor import MoRConfig, MoRLinear

LAYERS = {"fc1": (768, 3072), "fc2": (3072, 768), "qkv": (768, 2304), "proj": (768, 768)}  # ViT-B: (K, O)
MODES = ("forward", "forward_backward")
LORA_RANK, LORA_ALPHA = 8, 16
TOLERANCE = 1e-5  # |got - expected| / |expected|, Frobenius, in fp32
WARM_UP_ROUNDS = 2

Times = dict[str, dict[str, np.ndarray]]  # seconds of CPU by provider and mode, (rounds,)
Errors = dict[str, dict[str, float]]  # relative error by provider and tensor


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
        "versions": {name: module.__version__ for name, module in (("torch", torch), ("peft", peft), ("numpy", np))},
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": _git_state(),
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
    """The frozen linear and what is built around it; B is drawn, since the zeros that B starts from hide errors."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features).requires_grad_(False)
    default, eager = MoRLinear(base, MoRConfig()), MoRLinear(base, MoRConfig(), backend="eager")
    nn.init.normal_(default.mor_B, std=0.02)
    eager.load_state_dict(default.state_dict())

    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=["0"])
    wrapped: Any = peft.get_peft_model(nn.Sequential(base), config)
    lora = wrapped.base_model.model[0]  # the layer without the model around it
    nn.init.normal_(lora.lora_B["default"].weight, std=0.02)
    return {"frozen": base, "mor": default, "mor_eager": eager, "peft_lora": lora}


def draw_inputs(rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """x (T, K), which requires grad, and the gradient of the output, (T, O)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, in_features, generator=generator).requires_grad_()
    return x, torch.randn(rows, out_features, generator=generator)


def accuracy(providers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> Errors:
    """|got - expected| / |expected| of the output and of every gradient, the expected ones in float64."""
    errors = {}
    for provider, layer in providers.items():
        parameters: dict[str, Tensor] = dict(layer.named_parameters())
        got = _output_and_gradients(layer, x, dy, parameters)
        wide = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in parameters.items()}
        wide_x = x.detach().double().requires_grad_()
        expected = _output_and_gradients(EXPECTED[provider](wide), wide_x, dy.double(), wide)
        errors[provider] = {
            name: ((got[name].double() - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items()
        }
    return errors


def check_accuracy(errors: dict[str, Errors]) -> None:
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


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that forward keeps for backward, besides x and the parameters."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    for tensor in (x, *layer.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


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
        f"{' with changes to mor' if git['mor_changed'] else ''}. "
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


def _output_and_gradients(
    layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    trained = {"x": x, **{name: tensor for name, tensor in parameters.items() if tensor.requires_grad}}
    y = layer(x)
    gradients = torch.autograd.grad(y, list(trained.values()), dy)
    return {"output": y.detach(), **{f"gradient of {name}": g for name, g in zip(trained, gradients, strict=True)}}


# What each provider has to compute, from its parameters by name.


def _expected_mor(p: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    config = MoRConfig()

    def layer(x: Tensor) -> Tensor:
        y = F.linear(x, p["base.weight"], p["base.bias"])
        gates = F.linear(x, p["mor_router.weight"], p["mor_router.bias"]).softmax(-1)
        experts = zip(p["mor_A"].split(config.ranks), p["mor_B"].split(config.ranks), config.scaling, strict=True)
        for i, (A, B, scale) in enumerate(experts):
            y = y + gates[:, i, None] * scale * (x @ A.T @ B)
        return y

    return layer


def _expected_lora(p: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    A, B = p["lora_A.default.weight"], p["lora_B.default.weight"]
    scale = LORA_ALPHA / LORA_RANK
    return lambda x: F.linear(x, p["base_layer.weight"], p["base_layer.bias"]) + scale * (x @ A.T @ B.T)


def _expected_frozen(p: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, p["weight"], p["bias"])


EXPECTED = {
    "frozen": _expected_frozen,
    "mor": _expected_mor,
    "mor_eager": _expected_mor,
    "peft_lora": _expected_lora,
}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_state() -> dict[str, Any]:
    """The commit of the mor that is measured, and whether it, or anything beside it, differs from that commit."""
    # An installed copy is in no commit, though it may lie below a repository.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": "unknown", "mor_changed": None, "tree_changed": None}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "mor_changed": bool(_git("status", "--porcelain", "--", ".")),
        "tree_changed": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    folder = Path(mor.__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    main()
