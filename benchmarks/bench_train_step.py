"""What a training step of Early Intervention costs: images a second and peak memory, by how its adapters compute.

The step is the one that `ei train` takes, forward, losses, backward and the optimiser, on random images that are on the
device already: ViT-B with random weights, 448 px, batch 8, two modalities (so four ViTs), bf16 autocast. Variants are
frozen ViTs (heads, INT adapters and fusion still train), and MoR on fc1 and fc2 as a loop over the experts ("eager"),
as one product ("concat") and fused ("triton"); each as it is, compiled ("on") and in CUDA graphs ("graphs").

    python benchmarks/bench_train_step.py --out benchmarks/results
    python benchmarks/bench_train_step.py --device cpu --backbone tiny --size 32 --batch 2 --steps 3 --modes off

Before anything is timed, each variant's gradients are compared with those of the loop in fp32: one whose error is more
than 1.5 times that of the loop in the same precision gets no time.

What compiles nothing comes first, then the variants that compile soonest. The results are written anew after each
measurement, so a run that is killed leaves what it had measured; --modes and --variants ask for part of it, and write
over what is in the same folder.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import cpu_model, setup
from torch import Tensor, nn

import ei
import mor
import mor_kernels
from ei.compilation import compile_backbones
from ei.config import Config, DataConfig, ModelConfig, TrainConfig
from ei.data.sample import Batch
from ei.losses import loss_terms
from ei.models import Backbone, build_model, load_backbone
from ei.optimisation import Step, make_optimizer
from ei.processes import Processes
from ei.runtime import arithmetic, choose_device, narrow_frozen
from mor.files import write_atomically
from mor_kernels.measure import quantiles, table_in_use

PACKAGES = ("torch", "triton", "timm")
CODE = [Path(package.__file__).parent for package in (mor, mor_kernels, ei)]
MODALITIES = ("fundus", "oct")
CLASSES = 4
VARIANTS = ("frozen", "eager", "concat", "triton")
MODES = ("off", "on", "graphs")
SOONEST_COMPILED = ("frozen", "triton", "concat", "eager")
WARM_UP = 5
ERROR_LIMIT = 1.5  # of a variant's gradients, as a multiple of the loop's error in the same precision


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print a table, and write it."""
    parser = argparse.ArgumentParser(description="Images per second and peak memory of a training step.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backbone", default="vit_base_patch16_clip_224.openai")
    parser.add_argument("--size", type=int, default=448, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="samples per step, one image per modality")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=30, help="timed steps per variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing that would end after this")
    parser.add_argument("--out", type=Path, help="folder for the results (default: none are written)")
    options = parser.parse_args(arguments)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    print(report(result))
    if options.out and result["measurements"]:
        plot(result, path_of(result, options).with_suffix(".png"))


def path_of(result: dict[str, Any], options: argparse.Namespace) -> Path:
    return options.out / f"{result['device_name'].lower().replace(' ', '_')}_train_step.json"


def save(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Figures and table, as far as there are any yet."""
    if options.out:
        path = path_of(result, options)
        table = f"# A training step of Early Intervention\n\n{report(result)}\n"
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
        write_atomically(path.with_suffix(".md"), table.encode())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The set-up, and of each variant its error, and in each mode its times and memory."""
    started = time.monotonic()
    device = choose_device(options.device)
    config = Config(
        data=DataConfig(modalities=MODALITIES, image_size=options.size),
        model=ModelConfig(backbone=options.backbone, pretrained=False),
        train=TrainConfig(batch_size=options.batch, precision=options.precision),
    )
    torch.manual_seed(0)
    trunk = load_backbone(config.model, options.size)
    batch = random_batch(options.batch, options.size).to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    result: dict[str, Any] = {
        "device": device.type,
        "device_name": name,
        "table": table_in_use(name),
        **setup(PACKAGES, CODE),
        "backbone": options.backbone,
        "image_size": options.size,
        "batch": options.batch,
        "modalities": len(MODALITIES),
        "precision": options.precision,
        "steps": options.steps,
        "errors": {},
        "measurements": [],
        "not_measured": {},  # and why
    }
    expected = gradients(make_model(config, trunk, "eager").to(device), batch, "fp32")
    for variant in dict.fromkeys((*options.variants, "eager")):  # all others are held to the loop
        if variant != "frozen":
            try:
                result["errors"][variant] = error_of(variant, config, trunk, batch, expected)
            except Exception as error:  # a variant that cannot run leaves the others their times
                result["not_measured"][variant] = first_line(error)
    del expected
    longest = 0.0  # that a measurement has taken, in seconds
    for mode, variant in plan(options):
        what = f"{variant}, compile {mode}"
        if variant in result["not_measured"]:
            continue
        if not_exact(result["errors"], variant):
            print(f"{variant}: its gradients are off, so it gets no time", file=sys.stderr)
            continue
        if time.monotonic() - started + longest > 60 * options.minutes:
            result["not_measured"][what] = "out of time"
            continue
        print(what, file=sys.stderr, flush=True)
        begun = time.monotonic()
        try:
            found = measure_variant(variant, mode, config, trunk, batch, options)
            result["measurements"].append({"variant": variant, "compile": mode, **found})
        except Exception as error:  # as above
            result["not_measured"][what] = first_line(error)
        longest = max(longest, time.monotonic() - begun)
        save(result, options)
    return result


def plan(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Mode and variant of all measurements: what compiles nothing, then what compiles soonest."""
    every = product(options.modes, options.variants)
    return sorted(every, key=lambda pair: (pair[0] != "off", SOONEST_COMPILED.index(pair[1]), pair[0] != "graphs"))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]


def make_model(config: Config, trunk: Backbone, variant: str) -> nn.Module:
    """The classifier with its adapters in one variant; B is drawn, since the zeros it starts from hide errors."""
    adapter = "frozen" if variant == "frozen" else "mor"
    torch.manual_seed(1)
    model = build_model(replace(config, model=replace(config.model, adapter=adapter)), CLASSES, trunk=trunk)
    for layer in model.modules():
        if isinstance(layer, mor.MoRLinear):
            layer.backend = variant
            nn.init.normal_(layer.mor_B, std=0.02)
    return model


def error_of(variant: str, config: Config, trunk: Backbone, batch: Batch, expected: Tensor) -> float:
    got = gradients(make_model(config, trunk, variant).to(expected.device), batch, config.train.precision)
    return float((got - expected).norm() / expected.norm())


def not_exact(errors: dict[str, float], variant: str) -> bool:
    # So that NaN counts as wrong. 1e-4: in fp32 all of them are as good as exact.
    limit = max(ERROR_LIMIT * errors.get("eager", 0.0), 1e-4)
    return variant != "frozen" and variant in errors and not errors[variant] <= limit


def gradients(model: nn.Module, batch: Batch, precision: str) -> Tensor:
    """Of all trained parameters, as one vector."""
    assert batch.labels is not None
    with arithmetic(batch.labels.device, precision):
        output = model(batch)
    loss_terms(output, batch.labels, aux_weight=0.3, gate_weight=0.1, gate_prior=MODALITIES[0])["total"].backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def random_batch(samples: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return Batch(
        images={name: torch.randn(samples, 1, 3, size, size, generator=generator) for name in MODALITIES},
        present={name: torch.ones(samples, 1, dtype=torch.bool) for name in MODALITIES},
        labels=torch.arange(samples) % CLASSES,
        ids=[str(number) for number in range(samples)],
    )


def measure_variant(
    variant: str, mode: str, config: Config, trunk: Backbone, batch: Batch, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds to the first step's end, milliseconds a step, images a second, peak memory, share of kernel time."""
    assert batch.labels is not None
    device = batch.labels.device
    settings = replace(config.train, compile=mode)
    with private_copy(trunk) as own:
        model = make_model(config, own, variant).to(device).train()
        narrow_frozen(model, settings.precision)
        if mode != "off":
            compile_backbones(model, mode)
        optimizer = make_optimizer(list(mor.trainable_parameters(model).values()), settings)
        take = Step(model, optimizer, settings, Processes(device), gate_prior=MODALITIES[0])

        def step() -> None:
            take([batch])  # waits for the device, to read the loss

        started = time.perf_counter()
        step()
        first = time.perf_counter() - started
        for _ in range(WARM_UP):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = [timed(step, device) for _ in range(options.steps)]
        found = {
            "first_step_s": round(first, 3),
            "step_ms": quantiles([1e3 * seconds for seconds in times]),
            "images_per_second": round(len(MODALITIES) * options.batch / statistics.median(times), 2),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            # Graphs keep memory of their own, which counts as free between two steps.
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
            "kernel_share": kernel_share(step, statistics.median(times)) if device.type == "cuda" else None,
        }
    return found


@contextmanager
def private_copy(trunk: Backbone) -> Iterator[Backbone]:
    """A trunk for one variant alone; afterwards everything of it is given back, so that peaks can be compared."""
    try:
        yield copy.deepcopy(trunk)
    finally:
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def timed(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def kernel_share(step: Callable[[], None], seconds: float) -> float | None:
    """The time that kernels run as a share of a step's: far below one, launches or the host dominate.

    None where the profiler does not run, which must not cost the times.
    """
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(3):
                step()
    except RuntimeError as error:
        print(f"no share of kernels: {first_line(error)}", file=sys.stderr)
        return None
    # A range that somebody has given a name counts again what runs within it.
    microseconds = sum(
        event.self_device_time_total
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    return round(microseconds / 3e6 / seconds, 3)


def report(result: dict[str, Any]) -> str:
    """The set-up in a sentence, and a table in Markdown."""
    frozen = {m["compile"]: m["step_ms"][0] for m in result["measurements"] if m["variant"] == "frozen"}
    versions = result["versions"]
    lines = [
        f"{result['device_name']}, torch {versions['torch']}, triton {versions['triton']}, commit"
        f" {result['git']['commit'][:12]}. {result['backbone']}, {result['image_size']} px, batch {result['batch']},"
        f" {result['modalities']} modalities, {result['precision']}; median (20 %, 80 %) of {result['steps']} steps.",
        "",
        "| adapters | compile | ms a step | of frozen | images/s | peak memory (reserved) | in kernels | first step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = [(mode, variant) for mode in MODES for variant in VARIANTS]
    for m in sorted(result["measurements"], key=lambda m: order.index((m["compile"], m["variant"]))):
        (median, low, high), base, share = m["step_ms"], frozen.get(m["compile"]), m["kernel_share"]
        cells = [
            m["variant"],
            m["compile"],
            f"{median:.1f} ({low:.1f}, {high:.1f})",
            f"{median / base:.2f}" if base else "-",
            f"{m['images_per_second']:.0f}",
            gibibytes(m),
            f"{share:.2f}" if share else "-",
            f"{m['first_step_s']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    red = [variant for variant in result["errors"] if not_exact(result["errors"], variant)]
    errors = ", ".join(f"{variant} {error:.1e}" for variant, error in result["errors"].items())
    lines += ["", f"Error of all gradients against the loop in fp32: {errors}."]
    lines += [f"No time for {', '.join(red)}: its gradients are off."] if red else []
    lines += [f"Not measured: {what} ({why})." for what, why in result["not_measured"].items()]
    return "\n".join(lines)


def gibibytes(measurement: dict[str, Any]) -> str:
    used, reserved = measurement["peak_memory_bytes"], measurement["peak_reserved_bytes"]
    return f"{used / 2**30:.2f} GiB ({reserved / 2**30:.2f})" if used else "-"


def plot(result: dict[str, Any], path: Path) -> None:
    """Images a second, a group of bars for every mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = list(dict.fromkeys(m["compile"] for m in result["measurements"]))
    variants = list(dict.fromkeys(m["variant"] for m in result["measurements"]))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, variant in enumerate(variants):
        speed = {m["compile"]: m["images_per_second"] for m in result["measurements"] if m["variant"] == variant}
        places = [place + (number - (len(variants) - 1) / 2) * 0.8 / len(variants) for place in range(len(modes))]
        axes.bar(places, [speed.get(mode, 0) for mode in modes], 0.8 / len(variants), label=variant)
    axes.set_xticks(range(len(modes)), [f"compile {mode}" for mode in modes])
    axes.set_ylabel("images per second")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
