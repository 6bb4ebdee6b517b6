"""The idea of Early Intervention on data that every installation has: pairs of handwritten digits.

A sample has two modalities, an image of one digit each; its class says whether the first is odd and whether
the second is. So a branch that sees only its own digit can be right about half of the time and no more, and
one that is told about the other digit before it looks can be right always.

What is not faithful: the backbone is a tiny ViT, trained here on single digits in place of a foundation
model, and the optimiser is AdamW with a schedule that fits into a minute.
"""

import csv
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from ei.config import Config, DataConfig, ModelConfig, TrainConfig
from ei.models import load_backbone
from ei.progress import say, track
from ei.runs.setup import require_usable
from ei.runtime import seed_everything
from ei.training import train

CLASSES = ("even-even", "odd-even", "even-odd", "odd-odd")
MODALITIES = ("left", "right")
TRAIN_DIGITS, TRAIN_PAIRS, TEST_PAIRS = 1300, 2000, 600
MARKER = "demo.json"


def run_demo(out: Path, seed: int = 0) -> dict[str, Any]:
    """Write the data, train the backbone, then train with and without intervention; print and return the figures.

    Args:
        out: Folder to write to; one that an earlier demo made is replaced.
        seed: Of the pairs and of training.

    Returns:
        For "with INT" and "without INT", per prediction ("fused", "left", "right"): "accuracy" and "mAP".

    Raises:
        ValueError: ``out`` holds something else.
    """
    started = time.perf_counter()
    _make_folder(out)
    manifest = write_pairs(out / "data", seed)
    say("Pre-training a tiny ViT on single digits, in place of a foundation model.")
    weights, accuracy = pretrain(out / "backbone.safetensors", seed)
    say(f"It tells the ten digits apart with an accuracy of {accuracy:.3f} on digits that it has not seen.\n")

    config = demo_config(manifest, weights, seed)
    say("A digit is in several pairs, so that the same image is that of several patients: here, that note is no fault.")
    say("Training with INT.")
    with_int = train(config, out / "ei")
    say("\nTraining without INT, from the same stage 1.")
    late = replace(
        config,
        model=replace(config.model, fusion="late"),
        train=replace(config.train, stage1_from=str(with_int)),
    )
    results = {"without INT": figures(train(late, out / "late")), "with INT": figures(with_int)}
    seconds = time.perf_counter() - started
    (out / MARKER).write_text(json.dumps({"backbone": accuracy, "seconds": seconds, **results}, indent=1) + "\n")
    for line in comparison(results):
        say(line)
    say(f"\n{seconds:.0f} s. Report of the run with INT: {out / 'ei' / 'report.html'}")
    return results


def demo_config(manifest: Path, weights: Path, seed: int) -> Config:
    """Both stages on tiny images, without augmentation, for a fixed number of epochs."""
    return Config(
        data=DataConfig(
            manifest=str(manifest),
            modalities=MODALITIES,
            classes=CLASSES,
            image_size=8,
            rotation=0,
            crop=0,
            flip=0,
            jitter=0,
        ),
        model=ModelConfig(backbone="tiny", weights=str(weights)),
        train=TrainConfig(
            optimizer="adamw", lr=3e-3, lr_low=3e-4, cycle_epochs=3, batch_size=40, epochs=6, bootstrap=500, seed=seed
        ),
    )


def write_pairs(folder: Path, seed: int) -> Path:
    """Write the digits as PNG files and the pairs as a manifest; returns the manifest.

    Train and test pairs are drawn from digits that the other has not got. A patient has one to three pairs.
    """
    digits = load_digits()
    (folder / "digits").mkdir(parents=True)
    for number, image in enumerate(digits.images):
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(folder / "digits" / f"{number:04d}.png")
    generator = np.random.default_rng(seed)
    train_pool, test_pool = split_digits(len(digits.target))
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "patient", "split", "label", *MODALITIES])
        for split, pool, count in (("train", train_pool, TRAIN_PAIRS), ("test", test_pool, TEST_PAIRS)):
            patients = np.repeat(np.arange(count), generator.integers(1, 4, size=count))[:count]
            for number, (patient, pair) in enumerate(zip(patients, generator.choice(pool, (count, 2)), strict=True)):
                left, right = (int(digits.target[index]) % 2 for index in pair)
                images = [f"digits/{index:04d}.png" for index in pair]
                writer.writerow(
                    [
                        f"{split}-{number:04d}",
                        f"{split}-patient-{patient:04d}",
                        split,
                        CLASSES[left + 2 * right],
                        *images,
                    ]
                )
    return manifest


def split_digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the digits for training (the backbone's too) and for testing; always the same."""
    order = np.random.default_rng(0).permutation(count)
    return order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]


def pretrain(path: Path, seed: int, epochs: int = 20) -> tuple[Path, float]:
    """Train the tiny ViT on single digits of the training pool; returns its file and its accuracy on the others."""
    seed_everything(seed)
    data = DataConfig()
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    images = (images - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    labels = torch.tensor(digits.target)
    train_pool, test_pool = map(torch.from_numpy, split_digits(len(labels)))

    backbone = load_backbone(ModelConfig(backbone="tiny"), image_size=8).requires_grad_(True)
    model = nn.Sequential(backbone, nn.Linear(backbone.width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = len(train_pool) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * batches)
    for _ in track(range(epochs), "pre-training", epochs):
        for batch in train_pool[torch.randperm(len(train_pool))][: batches * 64].view(batches, 64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (model.eval()(images[test_pool]).argmax(1) == labels[test_pool]).float().mean().item()
    save_file(backbone.vit.state_dict(), path)
    return path, accuracy


def figures(run: Path) -> dict[str, dict[str, float]]:
    """Accuracy and mAP on the test pairs, fused and of each branch."""
    test = json.loads((run / "metrics.json").read_text())["splits"]["test"]
    return {
        name: {figure: measured["overall"][figure]["value"] for figure in ("accuracy", "mAP")}
        for name, measured in {"fused": test["fused"], **test["modalities"]}.items()
    }


def comparison(results: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """The table of the two runs, and what it means."""
    lines = [f"{TEST_PAIRS} test pairs       accuracy                  mAP"]
    lines.append("                     without INT   with INT   without INT   with INT")
    for name, title in (("fused", "fused"), *((modality, f"{modality} branch alone") for modality in MODALITIES)):
        cells = [results[run][name][figure] for figure in ("accuracy", "mAP") for run in ("without INT", "with INT")]
        lines.append(f"{title:<19}  {cells[0]:>11.3f}  {cells[1]:>9.3f}   {cells[2]:>11.3f}  {cells[3]:>9.3f}")
    return [
        *lines,
        "",
        "A class is the parity of both digits, and a branch looks at one of them: alone it knows half of the answer,",
        "so about 0.5 is the most it can reach. With INT it is told about the other digit before its first block,",
        "and answers for both. Fused predictions have both halves either way; INT shows in the branches.",
    ]


def _make_folder(out: Path) -> None:
    require_usable(out)
    if out.exists():
        if any(out.iterdir()) and not (out / MARKER).is_file():
            raise ValueError(f"{out} exists and was not made by the demo; choose another with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("{}\n")
