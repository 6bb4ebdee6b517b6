"""Training: two stages of one loop. Stage 1, each modality alone; stage 2, all together, from there.

Source: arXiv 2603.17514, section 3.5 (Algorithm 1) and section 4.1.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ei.checkpoint import Checkpoint, read_checkpoint, restore, trained_state, write_checkpoint
from ei.compilation import compile_backbones, require_compiler
from ei.config import Config, TrainConfig
from ei.data.loaders import training_loader
from ei.data.manifest import SPLITS, Manifest, Row, read_manifest
from ei.data.sample import Batch
from ei.evaluation import evaluate, predict_rows
from ei.losses import loss_terms
from ei.metrics import summarise
from ei.models import Backbone, LateFusion, build_model
from ei.progress import say, track
from ei.run_folder import RunFolder, StageFolder
from ei.runs import load_trunk, manifest_hash, stage1_checkpoint
from ei.runtime import arithmetic, choose_device, fingerprint, narrow_frozen, seed_everything
from mor import trainable_parameters


class TrainingError(ArithmeticError):
    """Training cannot go on: a loss or gradient is not finite."""


def train(config: Config, run: str | Path) -> Path:
    """Train a classifier and evaluate it.

    Args:
        config: Everything that the result depends on.
        run: Folder to write to; made, and must be empty if it is there.

    Returns:
        The folder: config.yaml, stage1/MODALITY and stage2 with histories and checkpoints, and what
        :func:`ei.evaluate` writes if the manifest has validation or test rows.

    Raises:
        ValueError: the configuration or the manifest cannot be used; nothing was trained.
        TrainingError: a loss or gradient is not finite; the message names the samples.
    """
    folder = RunFolder(Path(run))
    manifest = read_manifest(config.data.manifest, config.data)
    config = _resolve(config, manifest)
    _require_measurable(manifest)
    _make_empty(folder)
    device = choose_device(config.train.device)
    if config.train.compile != "off":
        require_compiler(device)
    with torch.device("meta"):  # settings that do not fit show now, not after hours of stage 1
        build_model(config, len(manifest.classes))
    trunk = load_trunk(config)
    is_random = not config.model.weights and (config.model.backbone == "tiny" or not config.model.pretrained)
    if is_random and config.model.adapter != "full":
        say("note: the backbone has random weights, and they are frozen; --weights, or --adapter full, may be meant")
    stages = Stages(config, manifest, device, trunk, fingerprint(trunk))
    taken = stages.taken_over()
    folder.path.mkdir(parents=True, exist_ok=True)
    config.save(folder.config)

    stage1, scores = {}, {}
    for modality in manifest.modalities if config.train.stages == "both" else ():
        model, scores[modality] = stages.first(modality, folder.stage1(modality), taken.get(modality))
        stage1[modality] = trained_state(model)
    prior = config.train.gate_prior or (max(scores, key=scores.__getitem__) if scores else "")
    if prior:
        say(f"gate prior: {prior}" + "".join(f"  {name} {score:.3f}" for name, score in scores.items()))
    stages.second(stage1, folder.stage2, prior)

    if manifest.split("val") or manifest.split("test"):
        evaluate(folder.path)
    return folder.path


@dataclass(frozen=True)
class Stages:
    """The two stages, and the loop that both run."""

    config: Config
    manifest: Manifest
    device: torch.device
    trunk: Backbone
    fingerprint: dict[str, list[float]]  # of the trunk's frozen weights

    def first(self, modality: str, folder: StageFolder, taken: Checkpoint | None) -> tuple[nn.Module, float]:
        """One modality alone, trained or taken over; its model and its mAP on the training rows."""
        alone = replace(self, config=replace(self.config, data=replace(self.config.data, modalities=(modality,))))
        seed_everything(self.config.train.seed)
        model = build_model(alone.config, len(self.manifest.classes), modality=modality, trunk=self.trunk)
        model.to(self.device)
        if taken:
            restore(model, taken.parameters)
            write_checkpoint(folder.best, taken.parameters, taken.notes)
            folder.finished.touch()
        else:
            alone.fit(model, folder, f"stage 1, {modality}", gate_prior=None)
        return model, alone._validate(model, self.manifest.split("train"))["mAP"]

    def second(self, stage1: Mapping[str, Mapping[str, Tensor]], folder: StageFolder, prior: str) -> None:
        """All modalities together, from what each has learned alone (nothing: from the backbone)."""
        seed_everything(self.config.train.seed)
        model = build_model(self.config, len(self.manifest.classes), trunk=self.trunk)
        if stage1:
            assert isinstance(model, LateFusion)
            model.start_from(stage1)
        gate_prior = self.manifest.modalities.index(prior) if prior else None
        self.fit(model.to(self.device), folder, "stage 2", gate_prior=gate_prior)

    def fit(self, model: nn.Module, folder: StageFolder, title: str, *, gate_prior: int | None) -> None:
        """Train until validation stops improving, or for all epochs; leaves the model at its best.

        Without validation rows the last epoch is the best. Each epoch writes a line of the history and the
        last checkpoint, and the best one when it is.
        """
        settings = self.config.train
        narrow_frozen(model, settings.precision)
        if settings.compile != "off":
            compile_backbones(model, settings.compile)
        rows, val_rows = self.manifest.split("train"), self.manifest.split("val")
        loader, sampler = training_loader(rows, self.config)
        parameters = trainable_parameters(model)
        optimizer = make_optimizer(list(parameters.values()), settings)
        count = sum(parameter.numel() for parameter in parameters.values())
        say(f"{title}: {len(rows)} train and {len(val_rows)} val samples, {count:,} trained parameters")

        best, since_best, step = -1.0, 0, 0
        for epoch in range(settings.epochs + 1):
            started = time.perf_counter()
            losses: dict[str, list[float]] = defaultdict(list)
            images = 0
            if epoch:
                model.train()
                sampler.set_epoch(epoch)
                for batch in track(loader, f"{title}, epoch {epoch}", len(loader)):
                    set_learning_rate(optimizer, cyclic_learning_rate(step / len(loader), settings))
                    values = train_step(model, batch.to(self.device), optimizer, settings, gate_prior)
                    for name, value in values.items():
                        losses[name].append(value)
                    images += sum(int(present.sum()) for present in batch.present.values())
                    step += 1
            seconds = time.perf_counter() - started
            val = self._validate(model, val_rows) if val_rows else None
            record = {
                "epoch": epoch,
                "step": step,
                "lr": optimizer.param_groups[0]["lr"],
                "loss": {name: float(np.mean(values)) for name, values in losses.items()} or None,
                "val": val,
                "images_per_second": round(images / seconds, 2) if epoch else None,
                "seconds": round(seconds, 3),
            }
            is_best = val is None or val["mAP"] > best
            self._keep(model, folder, record, is_best)
            if is_best:
                best, since_best = (val["mAP"] if val else best), 0
            else:
                since_best += 1
            say(f"{title}, epoch {epoch}/{settings.epochs}" + _describe(record, is_best))
            if since_best >= settings.patience:
                say(f"{title}: no better mAP in {settings.patience} validations, stopped")
                break
        chosen = read_checkpoint(folder.best)
        restore(model, chosen.parameters)
        folder.finished.touch()
        if chosen.notes["epoch"] == 0:
            say(f"{title}: the best mAP was that before the first step; training did not improve it")

    def taken_over(self) -> dict[str, Checkpoint]:
        """Stage 1 of another run, if the configuration names one."""
        source = self.config.train.stage1_from
        return {
            modality: stage1_checkpoint(source, modality, self.config, self.fingerprint)
            for modality in (self.manifest.modalities if source else ())
        }

    def _validate(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        logits = predict_rows(model, rows, self.config, device=self.device, what="validate").logits
        labels, patients = np.array([row.label for row in rows]), [row.patient for row in rows]
        measured = summarise(
            logits, labels, patients, self.manifest.classes, multi_label=self.manifest.multi_label, bootstrap=0
        )
        return {name: figure["value"] for name, figure in measured["overall"].items()}

    def _keep(self, model: nn.Module, folder: StageFolder, record: dict[str, Any], is_best: bool) -> None:
        state = trained_state(model)
        notes = {"epoch": record["epoch"], "step": record["step"], "val": record["val"]}
        notes |= {"trunk": self.fingerprint, "manifest": manifest_hash(self.config)}
        write_checkpoint(folder.last, state, notes)
        if is_best:
            write_checkpoint(folder.best, state, notes)
        with folder.history.open("a", encoding="utf-8") as history:
            history.write(json.dumps(record, allow_nan=False) + "\n")


def train_step(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, settings: TrainConfig, gate_prior: int | None
) -> dict[str, float]:
    """One step of the optimiser; returns the value of each term of the loss.

    Args:
        batch: With labels, on the model's device.
        settings: Weights of the losses, precision, whether the model is compiled.
        gate_prior: Index of the modality that the fusion is pulled to; None for a single modality.

    Raises:
        TrainingError: the loss or its gradient is not finite; the weights are as before.
    """
    if settings.compile == "graphs":
        torch.compiler.cudagraph_mark_step_begin()  # results of the step before may be overwritten
    assert batch.labels is not None
    with arithmetic(batch.labels.device, settings.precision):
        output = model(batch)
    terms = loss_terms(
        output,
        batch.labels,
        aux_weight=settings.aux_weight,
        gate_weight=settings.gate_weight,
        gate_prior=gate_prior,
    )
    optimizer.zero_grad(set_to_none=True)
    terms["total"].backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    values = {name: term.item() for name, term in terms.items()}
    # Checked before the step: what is not finite must never reach a weight.
    if not np.isfinite(values["total"]) or not torch.nn.utils.get_total_norm(gradients).isfinite():
        raise TrainingError(
            f"the loss ({values['total']}) or its gradient is not finite for the samples {', '.join(batch.ids)};"
            " nothing of it reached the weights. Look at their images, or lower lr"
        )
    optimizer.step()
    return values


def cyclic_learning_rate(epochs: float, settings: TrainConfig) -> float:
    """The learning rate after so many epochs: up and down in a triangle, each peak lower than the last.

    From ``lr_low`` to ``lr`` in ``cycle_epochs``, back in as many; each further cycle rises ``cycle_decay``
    times as high above ``lr_low``.

    >>> settings = TrainConfig(lr=1.0, lr_low=0.2, cycle_epochs=4, cycle_decay=0.5)
    >>> [round(cyclic_learning_rate(epochs, settings), 3) for epochs in (0, 2, 4, 6, 8, 12)]
    [0.2, 0.6, 1.0, 0.6, 0.2, 0.6]
    """
    cycle, position = divmod(epochs / settings.cycle_epochs, 2)
    height = (1 - abs(position - 1)) * settings.cycle_decay**cycle
    return settings.lr_low + (settings.lr - settings.lr_low) * height


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def make_optimizer(parameters: Sequence[nn.Parameter], settings: TrainConfig) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr_low, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters, lr=settings.lr_low, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def _resolve(config: Config, manifest: Manifest) -> Config:
    """The configuration as it is saved: classes in their order, files by absolute paths."""
    prior = config.train.gate_prior
    if prior and prior not in manifest.modalities:
        raise ValueError(f"gate_prior must be one of {', '.join(manifest.modalities)}, got '{prior}'")
    data = replace(config.data, classes=manifest.classes, manifest=str(Path(config.data.manifest).resolve()))
    weights = str(Path(config.model.weights).resolve()) if config.model.weights else ""
    source = str(Path(config.train.stage1_from).resolve()) if config.train.stage1_from else ""
    return replace(
        config,
        data=data,
        model=replace(config.model, weights=weights),
        train=replace(config.train, stage1_from=source),
    )


def _require_measurable(manifest: Manifest) -> None:
    """Every class can be learned; and the mAP that chooses the gate prior and the best epoch exists."""
    counts = {split: _positives(manifest, split).sum(0) for split in SPLITS}
    unseen = [name for name, count in zip(manifest.classes, counts["train"], strict=True) if not count]
    if unseen:
        raise ValueError(f"no train row is of class {', '.join(unseen)}; is a label misspelt, or a split wrong?")
    for split in ("train", "val"):
        rows = len(manifest.split(split))
        if rows and not any(0 < count < rows for count in counts[split]):
            raise ValueError(
                f"the {split} rows are all alike, so no average precision can be computed on them; add {split} rows of"
                " other classes, or leave val out altogether to train for exactly --epochs epochs"
            )
    numbers = zip(manifest.classes, *counts.values(), strict=True)
    say(f"classes, {'/'.join(SPLITS)} rows: " + ", ".join(f"{name} {a}/{b}/{c}" for name, a, b, c in numbers))


def _positives(manifest: Manifest, split: str) -> np.ndarray:
    """(N, C) bool: which rows of a split are of which class."""
    labels = [row.label for row in manifest.split(split)]
    if manifest.multi_label:
        return np.array(labels, dtype=bool).reshape(len(labels), len(manifest.classes))
    return np.array(labels, dtype=int)[:, None] == np.arange(len(manifest.classes))


def _make_empty(folder: RunFolder) -> None:
    if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise ValueError(f"{folder.path} exists and is not an empty folder; choose another with --out")


def _describe(record: dict[str, Any], is_best: bool) -> str:
    parts = []
    if record["loss"]:
        parts.append(f"loss {record['loss']['total']:.4f}")
    if record["val"]:
        parts.append(f"val mAP {record['val']['mAP']:.4f}" + (" (best)" if is_best else ""))
    if record["images_per_second"]:
        parts.append(f"{record['images_per_second']:.0f} images/s")
    return "".join(f"  {part}" for part in parts)
