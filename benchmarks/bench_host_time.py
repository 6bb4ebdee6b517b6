"""What a layer costs the processor before a card has anything to do: its time where launches dominate.

No card is needed. A stand-in driver says that an sm_90 card is there; Triton looks up and specialises every launch as
ever, and only the launch itself is left out. Tensors are small ones on the CPU, where torch's own operators take about
as long as it takes to launch them. In every round each layer runs once, in shuffled order.

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
        x, dy = harness.draw_inputs(ROWS, WIDTH, WIDTH, dtype=torch.bfloat16)
        times = time_providers(layers(), x, dy, options.rounds)
    results = {
        **setup,
        "rounds": options.rounds,
        "clock": "time.thread_time",
        "microseconds": {name: {mode: quantiles(1e6 * times[name][mode]) for mode in MODES} for name in times},
        "ratio_to_peft_lora": {
            name: {mode: quantiles(times[name][mode] / times["peft_lora"][mode]) for mode in MODES} for name in times
        },
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        harness.store(options.out / "host_time.json", results, report(results))
    else:
        print(report(results))


def quantiles(values: np.ndarray) -> list[float]:
    """At 20, 50 and 80 %."""
    return [float(f"{value:.4g}") for value in np.quantile(values, (0.2, 0.5, 0.8))]


def layers() -> dict[str, nn.Module]:
    """The frozen linear, and around it the fused layer and peft's LoRA."""
    base = harness.frozen_linear(WIDTH, WIDTH, dtype=torch.bfloat16)
    fused = harness.mor_layers({"mor": lambda: MoRLinear(base, MoRConfig(), backend="triton")})
    return {"frozen": base, **fused, "peft_lora": harness.lora_layer(base)}


def report(results: dict) -> str:
    """A table in Markdown, with where and how it was measured."""
    versions, names = results["versions"], {**NAMES, "mor": "MoR, backend triton, launches left out"}
    rows = []
    for name, by_mode in results["microseconds"].items():
        cells = ["{1:.0f} ({0:.0f}, {2:.0f})".format(*by_mode[mode]) for mode in MODES]
        ratios = ["{1:.2f} ({0:.2f}, {2:.2f})".format(*results["ratio_to_peft_lora"][name][mode]) for mode in MODES]
        rows.append(f"| {' | '.join([names[name], *cells, *ratios])} |")
    return "\n".join(
        [
            "# Host time of a layer, without a card",
            "",
            "Microseconds of one thread's CPU time a call, median (20 % and 80 % quantiles) of"
            f" {results['rounds']} rounds; {ROWS} x {WIDTH} in bf16, see benchmarks/bench_host_time.py."
            f" {results['cpu']}, torch {versions['torch']}, triton {versions['triton']}, peft {versions['peft']},"
            f" commit {results['git']['commit'][:12]}{' with changes' if results['git']['code_changed'] else ''}.",
            "",
            "| | forward | forward + backward | of the LoRA's of the same round | |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


if __name__ == "__main__":
    main()
