"""Volumes in three planes with three labels: does one plane, late fusion or Early Intervention tell most?

    python examples/04_hippocampus_planes.py hippocampus_48x64x48.npz OUT
    python benchmarks/bench_hippocampus.py OUT

Per seed: each plane alone (stage 1), then late fusion and Early Intervention, both from the same stage 1, all chosen by
mAP on the 40 validation cases and measured on the 50 test cases.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import setup

import ei
import mor
from ei import Config, DataConfig, ModelConfig, TrainConfig, load, train
from ei.data.manifest import read_manifest
from ei.evaluation.inference import predict_rows
from ei.metrics.classification import summarise
from ei.processes import Processes

RESULTS = Path(__file__).parent / "results"
VERSIONS, CODE = ("torch", "timm"), (Path(ei.__file__).parent, Path(mor.__file__).parent)
PLANES = ("axial", "coronal", "sagittal")
LABELS = ("small_total", "small_anterior", "small_posterior")


def configuration(manifest: Path, fusion: str, epochs: int, seed: int, stage1_from: str = "") -> Config:
    """A tiny ViT with random weights, trained in full. Size is what tells, so training images are not cropped."""
    return Config(
        data=DataConfig(
            manifest=str(manifest), modalities=PLANES, labels=LABELS, image_size=64, rotation=20, crop=0, flip=0
        ),
        model=ModelConfig(backbone="tiny", adapter="full", fusion=fusion),
        train=TrainConfig(
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            batch_size=16,
            cycle_epochs=epochs / 2,
            epochs=epochs,
            patience=epochs,
            stage1_from=stage1_from,
            seed=seed,
        ),
    )


def measured(run: Path, modality: str | None = None) -> dict[str, dict[str, float]]:
    """Overall figures on the test rows with intervals, of the final model or of a plane's stage 1."""
    model, config = load(run, modality)
    manifest = read_manifest(config.data.manifest, config.data, classes=config.data.classes)
    rows = manifest.split("test")
    logits = predict_rows(model, rows, config, processes=Processes(torch.device("cpu"))).logits
    labels, patients = np.array([row.label for row in rows]), [row.patient for row in rows]
    summary = summarise(logits, labels, patients, manifest.classes, multi_label=True, bootstrap=1000)
    return summary["overall"] | {name: entry["AP"] for name, entry in summary["per_class"].items()}


def one_seed(manifest: Path, epochs: int, seed: int, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    told = train(configuration(manifest, "ei", epochs, seed), folder / "ei")
    late = train(configuration(manifest, "late", epochs, seed, stage1_from=str(told)), folder / "late")
    return {plane: measured(told, plane) for plane in PLANES} | {"late fusion": measured(late), "EI": measured(told)}


def table(seeds: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """mAP by method as Markdown: of each seed with its 95 % interval over the test cases, and their mean."""
    lines = [f"| test mAP | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |", "|---" * (len(seeds) + 2) + "|"]
    for method in next(iter(seeds.values())):
        figures = [results[method]["mAP"] for results in seeds.values()]
        cells = [f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" for figure in figures]
        mean = float(np.mean([figure["value"] for figure in figures]))
        lines.append(f"| {method} | {' | '.join(cells)} | {mean:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what examples/04_hippocampus_planes.py wrote")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "hippocampus.json")
    arguments = parser.parse_args()
    manifest = arguments.folder / "manifest.csv"
    if not manifest.is_file():
        parser.error(f"{manifest} is no file; examples/04_hippocampus_planes.py writes it")
    made_by, started, seeds = setup(VERSIONS, CODE), time.perf_counter(), {}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            seeds[str(seed)] = one_seed(manifest, arguments.epochs, seed, Path(folder))
        print(table(seeds), flush=True)
    config = configuration(Path(manifest.name), "ei", arguments.epochs, 0).to_dict()
    rows = read_manifest(manifest, DataConfig(modalities=PLANES, labels=LABELS)).split("test")
    report = {
        "question": "mAP over three labels on 50 test cases, by plane and fused",
        "backbone": "tiny (width 64, 4 blocks, 8 x 8 patches of 8 px), random weights, trained in full",
        "config": config,
        "prevalence": dict(zip(LABELS, np.mean([row.label for row in rows], axis=0).round(3).tolist(), strict=True)),
        "seeds": seeds,
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
        "setup": made_by,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
