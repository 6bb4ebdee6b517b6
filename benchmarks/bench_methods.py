"""Every method of docs/comparison.md on real images: brain MRI of three patients, each left out once.

    python examples/02_brain_mri_patches.py ms_patches_48.npz OUT
    python benchmarks/bench_methods.py OUT --work runs/brain-methods

One protocol for all, `ei compare`'s; there is no validation split, so every model trains for the same fixed number of
epochs and the last one is evaluated. The backbone is tiny and random, so methods that keep it frozen start from
nothing: the table shows how methods compare on little data without pretraining, not how they rank in the paper. Three
patients are far too few for conclusions. Broken off, the same command goes on.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from harness import setup, store

import ei
import mor
from ei.comparison.compare import compare
from ei.config import Config, DataConfig, ModelConfig, TrainConfig

RESULTS = Path(__file__).parent / "results"
VERSIONS, CODE = ("torch", "timm"), (Path(ei.__file__).parent, Path(mor.__file__).parent)
MODALITIES = ("FLAIR", "T1", "T2")
PAPER = (*("mm-mil", "sfusion", "coscat", "raddiag", "dynmm", "mmrad", "mm-mil:mor", "mmrad-mor", "unimodel"),)
TEXTBOOKS = ("early", "late:average", "late:weighted", "late:max", "late:learned", "cross", "joint")
ADAPTERS = ("mor", "mor-no-bypass", "loramoe", "lora", "latelora", "rlrr", "vpt", "bitfit", "frozen", "peft:ia3")
# LoSA works on features of a ViT that nothing is added to, so it is trained with late fusion.
METHODS = (
    *("ei", "late", *(f"uni:{modality}" for modality in MODALITIES), *PAPER, *TEXTBOOKS),
    *(f"ei:{adapter}" for adapter in ADAPTERS),
    *("late:mor", "late:losa"),
)
MMRAD_MOR = "model: {fusion: mmrad, adapter: mor}\nbaseline: {mmrad_prompts: false}\n"


def configuration(manifests: list[Path], epochs: int) -> Config:
    """A tiny ViT with random weights, trained in full. Brightness is what tells lesions, so it is not jittered."""
    return Config(
        data=DataConfig(
            manifest=",".join(map(str, manifests)),
            modalities=MODALITIES,
            classes=("no_lesion", "lesion"),
            image_size=48,
            jitter=0,
        ),
        model=ModelConfig(backbone="tiny", adapter="full"),
        train=TrainConfig(
            optimizer="adamw",
            lr=1e-3,
            lr_low=1e-5,
            cycle_epochs=epochs / 2,
            epochs=epochs,
            batch_size=32,
            weight_decay=0.05,
            report_images=0,
        ),
    )


def table(content: Mapping[str, Any]) -> str:
    """mAP as Markdown, a row per method: on each patient, mean of the seeds, and the mean of them; 0.5 is chance."""
    folds = content["folds"]
    patients = " | ".join(fold.removeprefix("leave_out_") for fold in folds)
    lines = [f"| | trained | {patients} | mean | minutes |", "|---" * (len(folds) + 4) + "|"]
    for method in content["methods"]:
        found = [cell for cell in content["cells"] if cell["method"] == method["name"]]
        each = [np.mean([cell["sources"]["fused"]["mAP"] for cell in found if cell["fold"] == fold]) for fold in folds]
        figures = " | ".join(f"{value:.3f}" for value in (*each, np.mean(each)))
        minutes = (method["cost"]["seconds"] or 0) / 60
        lines.append(f"| {method['name']} | {method['parameters']:,} | {figures} | {minutes:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what examples/02_brain_mri_patches.py wrote")
    parser.add_argument("--work", type=Path, default=Path("runs/brain-methods"), help="the runs, and all four files")
    parser.add_argument("--methods", default=",".join(METHODS), help="only these, separated by commas")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "brain_mri_methods.json")
    arguments = parser.parse_args()
    manifests = sorted(arguments.folder.glob("leave_out_*.csv"))
    if not manifests:
        parser.error(f"{arguments.folder} holds no leave_out_*.csv")

    made_by = setup(VERSIONS, CODE)
    arguments.work.mkdir(parents=True, exist_ok=True)
    mmrad_mor = arguments.work / "mmrad-mor.yaml"
    mmrad_mor.write_text(MMRAD_MOR)
    names = [str(mmrad_mor) if name == mmrad_mor.stem else name for name in arguments.methods.split(",")]
    content = compare(configuration(manifests, arguments.epochs), names, arguments.work, seeds=arguments.seeds)
    content["protocol"]["data"]["manifest"] = "leave_out_*.csv"  # and not where it lay
    store(arguments.out, content | {"setup": made_by}, table(content))


if __name__ == "__main__":
    main()
