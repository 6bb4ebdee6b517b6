"""Training: two stages of one loop. Stage 1, each modality alone; stage 2, all together, from there.

Wherever it is stopped, the same call goes on from there, to the same weights.

Source: arXiv 2603.17514, section 3.5 (Algorithm 1) and section 4.1.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ei.checkpoint import (
    Checkpoint,
    load_optimizer_state,
    optimizer_state,
    read_checkpoint,
    restore,
    trained_state,
    write_checkpoint,
)
from ei.compilation import compile_backbones, require_compiler
from ei.config import Config, TrainConfig
from ei.data.listed import counted
from ei.data.loaders import training_loader
from ei.data.manifest import Manifest, Row, read_manifest
from ei.data.sample import Batch
from ei.evaluation import evaluate, predict_rows
from ei.interrupts import Interrupted, deferred
from ei.losses import loss_terms
from ei.metrics import summarise
from ei.models import Backbone, LateFusion, build_model
from ei.progress import say, track
from ei.run_folder import RunFolder, StageFolder
from ei.run_setup import locked, require_measurable, resolved, resumes
from ei.runs import joined, load_trunk, manifest_hash, names_of_backbones, open_run, stage1_checkpoint
from ei.runtime import (
    arithmetic,
    choose_device,
    environment,
    fingerprint,
    narrow_frozen,
    random_state,
    same_weights,
    seed_everything,
    set_random_state,
)
from ei.snapshots import Snapshot, newest_snapshot, write_snapshot
from mor import trainable_parameters
from mor.files import write_atomically


class TrainingError(ArithmeticError):
    """Training cannot go on: a loss or gradient is not finite."""


def train(config: Config, run: str | Path) -> Path:
    """Train a classifier and evaluate it; or go on with a run that was stopped.

    A run that goes on ends with the same weights, bit for bit, as one that was never stopped (on the same machine,
    device and number of threads).

    Args:
        config: Everything that the result depends on.
        run: Folder to write to; made if need be. It must be empty, or hold a run of the same configuration.

    Returns:
        The folder: config.yaml, stage1/MODALITY and stage2 with histories and checkpoints, and what
        :func:`ei.evaluate` writes if the manifest has validation or test rows.

    Raises:
        ValueError: the configuration, the manifest or the folder cannot be used; nothing was trained.
        TrainingError: a loss or gradient is not finite; the message names the samples.
        Interrupted: Ctrl-C or SIGTERM; it was saved where training stands.
    """
    folder = RunFolder(Path(run))
    manifest = read_manifest(config.data.manifest, config.data)
    if manifest.warnings:
        say(f"note: {counted(len(manifest.warnings), 'warning')} about {config.data.manifest}; 'ei check' shows all")
        say(f"  {manifest.warnings[0]}")
    config = resolved(config, manifest)
    require_measurable(manifest)
    going_on = resumes(folder, config)
    device = choose_device(config.train.device)
    if config.train.compile != "off":
        require_compiler(device)
    with torch.device("meta"):  # settings that do not fit show now, not after hours of stage 1
        build_model(config, len(manifest.classes))
    has_evaluation = bool(manifest.split("val") or manifest.split("test"))
    if folder.stage2.finished.is_file() and (folder.report.is_file() or not has_evaluation):
        say(f"{folder.path} is finished, there is nothing to do")
        return folder.path
    trunk = load_trunk(config)
    aux_trunk = load_trunk(config.auxiliary) if config.auxiliary else None
    settings = [each.model for each in (config, config.auxiliary) if each]
    is_random = any(not each.weights and (each.backbone == "tiny" or not each.pretrained) for each in settings)
    if is_random and config.model.adapter != "full":
        say("note: the backbone has random weights, and they are frozen; --weights, or --adapter full, may be meant")
    with deferred() as asked_to_stop:
        stages = Stages(config, manifest, device, trunk, fingerprint(trunk), asked_to_stop)
        if config.auxiliary and aux_trunk:
            weights = fingerprint(aux_trunk)
            auxiliary = replace(
                stages, config=config.auxiliary, trunk=aux_trunk, fingerprint=weights, role="auxiliary "
            )
            stages = replace(stages, auxiliary=auxiliary)
        taken = stages.taken_over()
        with locked(folder):
            if not going_on:
                config.save(folder.config)
            stages.run(folder, taken)
            if has_evaluation:
                evaluate(folder.path)
    return folder.path


@dataclass(frozen=True)
class Stages:
    """The two stages, and the loop that both run."""

    config: Config
    manifest: Manifest
    device: torch.device
    trunk: Backbone
    fingerprint: dict[str, list[float]]  # of the trunk's frozen weights, before they are held in another dtype
    asked_to_stop: Callable[[], int | None]
    role: str = ""
    auxiliary: "Stages | None" = None  # the first stage of auxiliary ViTs with a backbone of their own

    def run(self, folder: RunFolder, taken: Mapping[tuple[str, bool], Checkpoint]) -> None:
        """Both stages; a stage 1 that is ``taken`` from elsewhere is not trained."""
        settings = self.config.train
        stage1, auxiliary, scores = {}, {}, {}
        for modality in self.manifest.modalities if settings.stages == "both" else ():
            where, there = folder.stage1(modality), taken.get((modality, False))
            stage1[modality], scores[modality] = self.first(modality, where, there)
            if self.auxiliary:
                where, there = folder.stage1(modality, auxiliary=True), taken.get((modality, True))
                auxiliary[modality], _ = self.auxiliary.first(modality, where, there)
        prior = settings.gate_prior or (max(scores, key=scores.__getitem__) if scores else "")
        if prior:
            say(f"gate prior: {prior}" + "".join(f"  {name} {score:.3f}" for name, score in scores.items()))
        self.second(stage1, auxiliary or None, folder.stage2, prior)

    def first(self, modality: str, folder: StageFolder, taken: Checkpoint | None) -> tuple[Mapping[str, Tensor], float]:
        """One modality alone, trained or taken over; what it has learned, and its mAP on the training rows."""
        if folder.finished.is_file():
            learned = read_checkpoint(folder.best)
            self.require_same_origin(learned.notes, folder)
            return learned.parameters, json.loads(folder.finished.read_text())["train mAP"]
        alone = replace(self, config=replace(self.config, data=replace(self.config.data, modalities=(modality,))))
        seed_everything(self.config.train.seed)
        model = build_model(alone.config, len(self.manifest.classes), modality=modality, trunk=self.trunk)
        model.to(self.device)
        loop = Loop(alone, model, folder, f"stage 1, {self.role}{modality}", gate_prior=None)
        if taken:
            restore(model, taken.parameters)
            write_checkpoint(folder.best, taken.parameters, taken.notes)
        else:
            loop.run()
        score = loop.validate(self.manifest.split("train"))["mAP"]
        write_atomically(folder.finished, json.dumps({"train mAP": score}).encode())
        return trained_state(model), score

    def second(
        self,
        stage1: Mapping[str, Mapping[str, Tensor]],
        auxiliary: Mapping[str, Mapping[str, Tensor]] | None,
        folder: StageFolder,
        prior: str,
    ) -> None:
        """All modalities together, from what each has learned alone (nothing: from the backbone)."""
        if folder.finished.is_file():
            return
        seed_everything(self.config.train.seed)
        both, aux_trunk = self, None
        if self.auxiliary:
            both = replace(self, fingerprint=joined(self.fingerprint, self.auxiliary.fingerprint))
            aux_trunk = self.auxiliary.trunk
        model = build_model(self.config, len(self.manifest.classes), trunk=self.trunk, aux_trunk=aux_trunk)
        if stage1:
            assert isinstance(model, LateFusion)
            model.start_from(stage1, auxiliary)
        gate_prior = self.manifest.modalities.index(prior) if prior else None
        Loop(both, model.to(self.device), folder, "stage 2", gate_prior).run()
        write_atomically(folder.finished, b"{}")

    def taken_over(self) -> dict[tuple[str, bool], Checkpoint]:
        """Stage 1 of another run, if the configuration names one, by modality and whether it is an auxiliary ViT's.

        Auxiliary ViTs that the other run has not got, or with another backbone, are trained here.
        """
        source = self.config.train.stage1_from
        if not source:
            return {}
        roles = {False: self}
        if self.auxiliary and open_run(source)[1].model.aux_backbone == self.config.model.aux_backbone:
            roles[True] = self.auxiliary
        return {
            (modality, auxiliary): stage1_checkpoint(
                source, modality, stages.config, stages.fingerprint, auxiliary=auxiliary
            )
            for auxiliary, stages in roles.items()
            for modality in self.manifest.modalities
        }

    def origin(self) -> dict[str, Any]:
        """What every checkpoint notes: the manifest and the frozen weights that it was made with."""
        return {"trunk": self.fingerprint, "manifest": manifest_hash(self.config)}

    def require_same_origin(self, notes: Mapping[str, Any], folder: StageFolder) -> None:
        """Raise a ValueError if a checkpoint of this run was made with others."""
        if notes["manifest"] != self.origin()["manifest"]:
            raise ValueError(
                f"{self.config.data.manifest} is not what it was when {folder.path} was begun; restore it, or choose"
                " another folder with --out"
            )
        if self.config.model.adapter != "full" and not same_weights(notes["trunk"], self.fingerprint):
            raise ValueError(
                f"the frozen weights of {names_of_backbones(self.config)} are not those that {folder.path} was"
                " begun with"
            )


@dataclass
class Position:
    """Where a stage stands, between two steps."""

    epoch: int = 0  # 0 is validated only: the model before its first step
    batch: int = 0  # how many of the epoch's are done
    step: int = 0
    best: float = -1.0
    since_best: int = 0
    records: int = 0  # lines of the history
    lr: float = 0.0  # of the last step
    losses: dict[str, list[float]] = field(default_factory=dict)  # of the epoch's steps
    images: int = 0
    seconds: float = 0.0


class Loop:
    """A stage: train until validation stops improving, or for all epochs; leaves the model at its best.

    Without validation rows the last epoch is the best. Each epoch writes a line of the history, the best checkpoint
    when it is, and a snapshot to go on from; so does, between epochs, every ``save_minutes``, and being asked to stop.
    """

    def __init__(
        self, stages: Stages, model: nn.Module, folder: StageFolder, title: str, gate_prior: int | None
    ) -> None:
        self.config, self.manifest, self.device = stages.config, stages.manifest, stages.device
        self.asked_to_stop = stages.asked_to_stop
        self.settings = settings = stages.config.train
        self.model, self.folder, self.title, self.gate_prior = model, folder, title, gate_prior
        self.stages, self.origin = stages, stages.origin()
        self.loader, self.sampler = training_loader(self.manifest.split("train"), self.config)
        self.optimizer = make_optimizer(list(trainable_parameters(model).values()), settings)
        self.at = Position(lr=settings.lr_low)
        self.best: dict[str, Tensor] = {}
        self.best_notes: dict[str, Any] = {}
        self.saved = time.monotonic()

    def run(self) -> None:
        settings, title, val_rows = self.settings, self.title, self.manifest.split("val")
        count = sum(parameter.numel() for parameter in trainable_parameters(self.model).values())
        rows = f"{len(self.manifest.split('train'))} train and {len(val_rows)} val samples"
        say(f"{title}: {rows}, {count:,} trained parameters")
        self._go_on()
        narrow_frozen(self.model, settings.precision)
        if settings.compile != "off":
            compile_backbones(self.model, settings.compile)
        while self.at.epoch <= settings.epochs and self.at.since_best < settings.patience:
            if self.at.epoch:
                self._train_epoch()
            self._close_epoch(self.validate(val_rows) if val_rows else None)
        if self.at.since_best >= settings.patience:
            say(f"{title}: no better mAP in {settings.patience} validations, stopped")
        restore(self.model, self.best)
        write_checkpoint(self.folder.best, self.best, self.best_notes)
        if self.best_notes["epoch"] == 0:
            say(f"{title}: the best mAP was that before the first step; training did not improve it")

    def validate(self, rows: Sequence[Row]) -> dict[str, float]:
        """mAP and the other measures over all samples."""
        logits = predict_rows(self.model, rows, self.config, device=self.device, what="validate").logits
        labels, patients = np.array([row.label for row in rows]), [row.patient for row in rows]
        measured = summarise(
            logits, labels, patients, self.manifest.classes, multi_label=self.manifest.multi_label, bootstrap=0
        )
        return {name: figure["value"] for name, figure in measured["overall"].items()}

    def _train_epoch(self) -> None:
        at, settings, title = self.at, self.settings, self.title
        self.model.train()
        self.sampler.set_epoch(at.epoch, start=at.batch * settings.batch_size)
        before, started = at.seconds, time.perf_counter()
        for batch in track(self.loader, f"{title}, epoch {at.epoch}", len(self.loader) - at.batch):
            at.lr = cyclic_learning_rate(at.step / len(self.loader), settings)
            set_learning_rate(self.optimizer, at.lr)
            values = train_step(self.model, batch.to(self.device), self.optimizer, settings, self.gate_prior)
            for name, value in values.items():
                at.losses.setdefault(name, []).append(value)
            at.images += sum(int(present.sum()) for present in batch.present.values())
            at.batch, at.step, at.seconds = at.batch + 1, at.step + 1, before + time.perf_counter() - started
            if self.asked_to_stop() or time.monotonic() - self.saved > 60 * settings.save_minutes:
                self._save()
            self._stop_if_asked()

    def _close_epoch(self, val: dict[str, float] | None) -> None:
        at, folder = self.at, self.folder
        record = {
            "epoch": at.epoch,
            "step": at.step,
            "lr": at.lr,
            "loss": {name: float(np.mean(values)) for name, values in at.losses.items()} or None,
            "val": val,
            "images_per_second": round(at.images / at.seconds, 2) if at.images else None,
            "seconds": round(at.seconds, 3),
        }
        is_best = val is None or val["mAP"] > at.best
        if is_best:
            self.best, at.best = trained_state(self.model), (val["mAP"] if val else at.best)
            self.best_notes = {"epoch": at.epoch, "step": at.step, "val": val, **self.origin}
            write_checkpoint(folder.best, self.best, self.best_notes)
        with folder.history.open("a", encoding="utf-8") as history:
            history.write(json.dumps(record, allow_nan=False) + "\n")
        say(f"{self.title}, epoch {at.epoch}/{self.settings.epochs}" + _describe(record, is_best))
        self.at = Position(
            epoch=at.epoch + 1,
            step=at.step,
            best=at.best,
            since_best=0 if is_best else at.since_best + 1,
            records=at.records + 1,
            lr=at.lr,
        )
        self._save()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if number := self.asked_to_stop():
            raise Interrupted(number)

    def _save(self) -> None:
        moments, numbers = optimizer_state(self.optimizer)
        tensors = {
            "parameters": trained_state(self.model),
            "best": self.best,
            "optimizer": moments,
            "random": random_state(self.device),
        }
        notes = {
            "position": asdict(self.at),
            "optimizer": numbers,
            "best": self.best_notes,
            "origin": self.origin,
            "environment": environment(self.device),
        }
        # Two snapshots of one step: at the end of an epoch, and before the first step of the next.
        write_snapshot(self.folder.snapshots, Snapshot(2 * self.at.step + (self.at.batch == 0), tensors, notes))
        self.saved = time.monotonic()

    def _go_on(self) -> None:
        """From the newest snapshot, if there is one."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        snapshot = newest_snapshot(self.folder.snapshots)
        if snapshot is not None:
            self.stages.require_same_origin(snapshot.notes["origin"], self.folder)
            self._compare_environment(snapshot.notes["environment"])
            self.at = Position(**snapshot.notes["position"])
            self.best, self.best_notes = snapshot.tensors["best"], snapshot.notes["best"]
            restore(self.model, snapshot.tensors["parameters"])
            load_optimizer_state(self.optimizer, snapshot.tensors["optimizer"], snapshot.notes["optimizer"])
            set_random_state(snapshot.tensors["random"], self.device)
            say(f"{self.title}: going on in epoch {self.at.epoch} after step {self.at.step}")
        # A line may have been written after the last snapshot.
        lines = self.folder.history.read_text(encoding="utf-8").splitlines(True) if self.folder.history.exists() else []
        write_atomically(self.folder.history, "".join(lines[: self.at.records]).encode())

    def _compare_environment(self, was: Mapping[str, str]) -> None:
        now = environment(self.device)
        changed = [f"{name} (was {was.get(name)}, is {value})" for name, value in now.items() if was.get(name) != value]
        if changed:
            say(f"note: weights may differ in their last bits from those of an unbroken run: {', '.join(changed)}")


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


def _describe(record: dict[str, Any], is_best: bool) -> str:
    parts = []
    if record["loss"]:
        parts.append(f"loss {record['loss']['total']:.4f}")
    if record["val"]:
        parts.append(f"val mAP {record['val']['mAP']:.4f}" + (" (best)" if is_best else ""))
    if record["images_per_second"]:
        parts.append(f"{record['images_per_second']:.0f} images/s")
    return "".join(f"  {part}" for part in parts)
