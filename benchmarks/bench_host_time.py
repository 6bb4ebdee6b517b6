"""What a layer costs the processor before a card has anything to do: its time where launches dominate.

No card is needed. A stand-in driver says that an sm_90 card is there; Triton looks up and specialises every launch as
ever, and only the launch itself is left out. Tensors are small ones on the CPU, where torch's own operators stand for
what launches them on a card: a product of matrices takes longer there in bf16 than in fp32, and a card's library lies
somewhere between; a LoRA has eight of them and a MoR two. In every round each layer runs once, in shuffled order.

    PYTHONPATH=.:kernels python benchmarks/bench_host_time.py --out benchmarks/results
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import harness
import numpy as np
import torch
import triton
from bench_mor_linear_cpu import MODES, NAMES, time_providers
from torch import nn
from triton.compiler import CompiledKernel

import mor.functional
import mor_kernels.linear
from mor import MoRConfig, MoRLinear
from mor_kernels import tables
from mor_kernels.blocks import default_tiles
from mor_kernels.measure import StandInDriver

ROWS, WIDTH = 32, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def launch_nothing(kernel: CompiledKernel) -> None:
    """In place of loading a compiled kernel: what would launch it does nothing."""
    kernel._run, kernel.function = (lambda *arguments: None), 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description="Host time of a Mixture-of-Ranks layer beside a peft LoRA, no card.")
    parser.add_argument("--rounds", type=int, default=4000, help="how often everything is timed (default: 4000)")
    parser.add_argument("--out", type=Path, help="folder for host_time.json and .md (default: none is written)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(StandInDriver())
    setup = harness.setup(("torch", "triton", "peft"), [Path(mor.__file__).parent, Path(mor_kernels.__file__).parent])
    table = tables.Table(default_tiles((9, 0)), {})
    with (
        mock.patch.object(CompiledKernel, "_init_handles", launch_nothing),
        mock.patch.object(tables, "table_of", lambda device: table),
        mock.patch.object(mor.functional, "_cached_availability", lambda device: True),
        mock.patch.object(mor_kernels.linear, "INTERPRETED", True),  # lets tensors on the CPU in
    ):
        measured = {name: measure(dtype, options.rounds) for name, dtype in DTYPES.items()}
    results = {**setup, "rounds": options.rounds, "clock": "time.thread_time", **measured}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        harness.store(options.out / "host_time.json", results, report(results))
    else:
        print(report(results))


def measure(dtype: torch.dtype, rounds: int) -> dict[str, dict]:
    """Microseconds by layer and mode, and ratios to peft's LoRA of the same round."""
    x, dy = harness.draw_inputs(ROWS, WIDTH, WIDTH, dtype=dtype)
    times = time_providers(layers(dtype), x, dy, rounds)
    return {
        "microseconds": {name: {mode: quantiles(1e6 * times[name][mode]) for mode in MODES} for name in times},
        "ratio_to_peft_lora": {
            name: {mode: quantiles(times[name][mode] / times["peft_lora"][mode]) for mode in MODES} for name in times
        },
    }


def quantiles(values: np.ndarray) -> list[float]:
    """At 20, 50 and 80 %."""
    return [float(f"{value:.4g}") for value in np.quantile(values, (0.2, 0.5, 0.8))]


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """The frozen linear, and around it the fused layer and peft's LoRA."""
    base = harness.frozen_linear(WIDTH, WIDTH, dtype=dtype)
    fused = harness.mor_layers({"mor": lambda: MoRLinear(base, MoRConfig(), backend="triton")})
    return {"frozen": base, **fused, "peft_lora": harness.lora_layer(base)}


def report(results: dict) -> str:
    """A table in Markdown, with where and how it was measured."""
    versions, names = results["versions"], {**NAMES, "mor": "MoR, backend triton, launches left out"}
    rows = []
    for dtype in DTYPES:
        for name, by_mode in results[dtype]["microseconds"].items():
            by_round = results[dtype]["ratio_to_peft_lora"][name]
            cells = ["{1:.0f} ({0:.0f}, {2:.0f})".format(*by_mode[mode]) for mode in MODES]
            ratios = ["{1:.2f} ({0:.2f}, {2:.2f})".format(*by_round[mode]) for mode in MODES]
            rows.append(f"| {' | '.join([dtype, names[name], *cells, *ratios])} |")
    return "\n".join(
        [
            "# Host time of a layer, without a card",
            "",
            "Microseconds of one thread's CPU time a call, median (20 % and 80 % quantiles) of"
            f" {results['rounds']} rounds; {ROWS} x {WIDTH}, see benchmarks/bench_host_time.py."
            f" {results['cpu']}, torch {versions['torch']}, triton {versions['triton']}, peft {versions['peft']},"
            f" commit {results['git']['commit'][:12]}{' with changes' if results['git']['code_changed'] else ''}.",
            "",
            "| | | forward | forward + backward | of the LoRA's of the same round | |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


if __name__ == "__main__":
    main()
