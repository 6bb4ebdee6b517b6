"""Does early intervention help on real images? Three patients, each left out once; AP on the one left out.

    python examples/02_brain_mri_patches.py ms_patches_48.npz OUT
    python benchmarks/bench_brain_mri.py OUT

Per fold: each sequence alone (stage 1), late fusion and Early Intervention, both from the same stage 1. There is no
validation split, so every model trains for the same fixed number of epochs and the last one is evaluated. Three
patients are far too few for conclusions; the table is here because it is what came out.
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
from ei.metrics.classification import average_precision
from ei.processes import Processes

RESULTS = Path(__file__).parent / "results"
VERSIONS, CODE = ("torch", "timm"), (Path(ei.__file__).parent, Path(mor.__file__).parent)
MODALITIES = ("FLAIR", "T1", "T2")


def configuration(manifest: Path, fusion: str, adapter: str, epochs: int, seed: int, stage1_from: str = "") -> Config:
    """A tiny ViT with random weights. Brightness is what tells lesions, so it is not jittered."""
    return Config(
        data=DataConfig(
            manifest=str(manifest), modalities=MODALITIES, classes=("no_lesion", "lesion"), image_size=48, jitter=0
        ),
        model=ModelConfig(backbone="tiny", adapter=adapter, fusion=fusion),
        train=TrainConfig(
            optimizer="adamw",
            lr=1e-3,
            lr_low=1e-5,
            cycle_epochs=epochs / 2,
            epochs=epochs,
            batch_size=32,
            weight_decay=0.05,
            stage1_from=stage1_from,
            seed=seed,
        ),
    )


def lesion_ap(run: Path, modality: str | None = None) -> float:
    """AP of the class "lesion" on the test rows, of the final model or of a modality's stage 1."""
    model, config = load(run, modality)
    rows = read_manifest(config.data.manifest, config.data, classes=config.data.classes).split("test")
    logits = predict_rows(model, rows, config, processes=Processes(torch.device("cpu"))).logits
    return average_precision(logits[:, 1], np.array([row.label for row in rows]))


def fold(manifest: Path, adapter: str, epochs: int, seed: int, folder: Path) -> dict[str, float]:
    """AP of every method, and the share of lesions among the test patches."""
    told = train(configuration(manifest, "ei", adapter, epochs, seed), folder / "ei")
    late = train(configuration(manifest, "late", adapter, epochs, seed, stage1_from=str(told)), folder / "late")
    config = Config.load(told / "config.yaml")
    rows = read_manifest(config.data.manifest, config.data, classes=config.data.classes).split("test")
    result = {"prevalence": float(np.mean([row.label for row in rows]))}
    result |= {modality: lesion_ap(told, modality) for modality in MODALITIES}
    return result | {"late fusion": lesion_ap(late), "EI": lesion_ap(told)}


def table(folds: dict[str, dict[str, float]]) -> str:
    """The results as Markdown, a row per method."""
    methods = list(next(iter(folds.values())))
    lines = [f"| | {' | '.join(folds)} | mean |", "|---" * (len(folds) + 2) + "|"]
    for method in methods:
        values = [figures[method] for figures in folds.values()]
        cells = " | ".join(f"{value:.3f}" for value in [*values, float(np.mean(values))])
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what examples/02_brain_mri_patches.py wrote")
    parser.add_argument("--adapter", choices=["full", "mor"], default="full", help="how the random backbone learns")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/brain_mri_ADAPTER.json")
    arguments = parser.parse_args()
    out = arguments.out or RESULTS / f"brain_mri_{arguments.adapter}.json"
    settings = (arguments.adapter, arguments.epochs, arguments.seed)
    manifests = sorted(arguments.folder.glob("leave_out_*.csv"))
    if not manifests:
        parser.error(f"{arguments.folder} holds no leave_out_*.csv")

    made_by, started, folds = setup(VERSIONS, CODE), time.perf_counter(), {}
    for manifest in manifests:
        with tempfile.TemporaryDirectory() as folder:
            name = f"patient {manifest.stem.removeprefix('leave_out_')} left out"
            folds[name] = fold(manifest, *settings, Path(folder))
        print(table(folds), flush=True)
    report = {
        "question": "AP of 'lesion' on the patient left out",
        "backbone": f"tiny (width 64, 4 blocks, 8 x 8 patches of 6 px), random weights, adapter: {arguments.adapter}",
        "config": configuration(Path("leave_out_*.csv"), "ei", *settings).to_dict(),
        "folds": folds,
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
        "setup": made_by,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
