"""Training: two stages of one loop. Stage 1, each modality alone; stage 2, all together, from there.

Wherever it is stopped, the same call goes on from there, to the same weights.

Source: arXiv 2603.17514, section 3.5 (Algorithm 1) and section 4.1.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ei.compilation import compile_backbones, require_compiler
from ei.config import GATED, TWO_STAGES, Config, DataConfig
from ei.data.balance import inverse_frequencies
from ei.data.loaders import TrainingSteps
from ei.data.manifest import Manifest, Row, read_manifest
from ei.evaluation.evaluate import evaluate
from ei.evaluation.inference import predict_rows
from ei.interrupts import Interrupted, deferred
from ei.metrics.classification import summarise
from ei.models import Backbone, LateFusion, build_model
from ei.optimisation import Step, cyclic_learning_rate, make_optimizer, set_learning_rate
from ei.processes import Processes
from ei.progress import say, track
from ei.runs.checkpoint import (
    Checkpoint,
    load_optimizer_state,
    optimizer_state,
    read_checkpoint,
    restore,
    trained_state,
    write_checkpoint,
)
from ei.runs.folder import RunFolder, StageFolder
from ei.runs.history import History, require_tensorboard
from ei.runs.loading import (
    changed_data,
    data_hashes,
    joined,
    load_trunk,
    names_of_backbones,
    stage1_taken_over,
)
from ei.runs.setup import locked, require_measurable, require_negatives, resolved, resumes, tell_rows, tell_warnings
from ei.runs.snapshots import Snapshot, newest_snapshot, write_snapshot
from ei.runtime import (
    environment,
    fingerprint,
    narrow_frozen,
    peak_memory,
    random_state,
    same_weights,
    seed_everything,
    set_random_state,
)
from mor import trainable_parameters
from mor.files import write_atomically


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
    processes = Processes.join(config.train.device)
    folder = RunFolder(Path(run))
    with processes.first_before_others():  # images that one has read, the others need not
        manifest = read_manifest(config.data.manifest, config.data)
    tell_warnings(manifest, config.data.manifest)
    config = resolved(config, manifest)
    require_negatives(config, processes.count)
    require_measurable(manifest, alone=config.train.stages == "both")
    tell_rows(manifest)
    processes.first(lambda: resumes(folder, config))
    if config.train.compile != "off":
        require_compiler(processes.device)
    if config.train.tensorboard:
        require_tensorboard()
    with torch.device("meta"):  # settings that do not fit show now, not after hours of stage 1
        build_model(config, len(manifest.classes))
    has_evaluation = bool(manifest.split("val") or manifest.split("test"))
    if processes.first(lambda: folder.stage2.finished.is_file() and (folder.report.is_file() or not has_evaluation)):
        say(f"{folder.path} is finished, there is nothing to do")
        return folder.path
    with processes.first_before_others():  # published weights are downloaded once
        trunk = load_trunk(config)
        aux_trunk = load_trunk(config.auxiliary) if config.auxiliary else None
    settings = [each.model for each in (config, config.auxiliary) if each]
    is_random = any(not each.weights and (each.backbone == "tiny" or not each.pretrained) for each in settings)
    if is_random and config.model.adapter != "full":
        say("note: the backbone has random weights, and they are frozen; --weights, or --adapter full, may be meant")
    with deferred() as asked_to_stop:
        stages = Stages(config, manifest, processes, trunk, fingerprint(trunk), asked_to_stop)
        if aux_trunk:
            stages = stages.with_auxiliary(aux_trunk)
        taken = stages.taken_over()
        with locked(folder) if processes.is_first else nullcontext():
            if processes.is_first and not resumes(folder, config):  # asked again: another may have begun meanwhile
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
    processes: Processes
    trunk: Backbone
    fingerprint: dict[str, list[float]]  # of the trunk's frozen weights, before they are held in another dtype
    asked_to_stop: Callable[[], int | None]
    role: str = ""
    auxiliary: "Stages | None" = None  # the first stage of auxiliary ViTs with a backbone of their own

    def with_auxiliary(self, trunk: Backbone) -> "Stages":
        assert self.config.auxiliary
        theirs = replace(
            self, config=self.config.auxiliary, trunk=trunk, fingerprint=fingerprint(trunk), role="auxiliary "
        )
        return replace(self, auxiliary=theirs)

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
        if self.config.model.fusion not in GATED:
            prior = ""
        if prior:
            say(f"gate prior: {prior}" + "".join(f"  {name} {score:.3f}" for name, score in scores.items()))
        self.second(stage1, auxiliary or None, folder.stage2, prior)

    def first(self, modality: str, folder: StageFolder, taken: Checkpoint | None) -> tuple[Mapping[str, Tensor], float]:
        """One modality alone, trained or taken over; what it has learned, and its mAP on the training rows."""
        if self.processes.first(folder.finished.is_file):
            learned = read_checkpoint(folder.best)
            self.require_same_origin(learned.notes, folder)
            return learned.parameters, json.loads(folder.finished.read_text())["train mAP"]
        config = replace(self.config, data=self.config.data.alone(modality))
        alone = replace(self, config=config, manifest=self.manifest.having(modality))
        seed_everything(self.config.train.seed)
        model = build_model(alone.config, len(self.manifest.classes), modality=modality, trunk=self.trunk)
        loop = Loop(alone, model, folder, f"stage 1, {self.role}{modality}", gate_prior=None)
        if taken:
            restore(model, taken.parameters)
            loop.write_best(taken.parameters, taken.notes)
        else:
            loop.run()
        score = loop.validate(alone.manifest.split("train"))["mAP"]
        self.finish(folder, {"train mAP": score})
        return trained_state(model), score

    def second(
        self,
        stage1: Mapping[str, Mapping[str, Tensor]],
        auxiliary: Mapping[str, Mapping[str, Tensor]] | None,
        folder: StageFolder,
        prior: str,
    ) -> None:
        """All modalities together, from what each has learned alone (nothing: from the backbone)."""
        if self.processes.first(folder.finished.is_file):
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
        title = "stage 2" if self.config.model.fusion in TWO_STAGES else "training"
        Loop(both, model, folder, title, prior or None).run()
        self.finish(folder, {})

    def finish(self, folder: StageFolder, notes: Mapping[str, Any]) -> None:
        if self.processes.is_first:
            write_atomically(folder.finished, json.dumps(notes).encode())

    def taken_over(self) -> dict[tuple[str, bool], Checkpoint]:
        """Stage 1 of another run, if the configuration names one; auxiliary ViTs that it lacks are trained here."""
        theirs = self.auxiliary.fingerprint if self.auxiliary else None
        return stage1_taken_over(self.config, self.manifest, self.fingerprint, theirs)

    def origin(self) -> dict[str, Any]:
        """What every checkpoint notes: the manifest, its images and the frozen weights that it was made with."""
        return {"trunk": self.fingerprint, **data_hashes(self.config, self.manifest)}

    def require_same_origin(self, notes: Mapping[str, Any], folder: StageFolder) -> None:
        """Raise a ValueError if a checkpoint of this run was made with others."""
        if changed := changed_data(notes, self.config, self.manifest):
            raise ValueError(
                f"{changed} is not what it was when {folder.path} was begun; restore it, or choose another folder with"
                " --out"
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
        self, stages: Stages, model: nn.Module, folder: StageFolder, title: str, gate_prior: str | None
    ) -> None:
        self.config, self.manifest, self.processes = stages.config, stages.manifest, stages.processes
        self.asked_to_stop = stages.asked_to_stop
        self.settings = settings = stages.config.train
        self.model, self.folder, self.title, self.gate_prior = model, folder, title, gate_prior
        self.stages, self.origin = stages, stages.origin()
        self.model.to(self.processes.device)
        self.optimizer = make_optimizer(list(trainable_parameters(model).values()), settings)
        self.at = Position(lr=settings.lr_low)
        self.best: dict[str, Tensor] = {}
        self.best_notes: dict[str, Any] = {}
        self.saved = time.monotonic()

    def run(self) -> None:
        settings, title, val_rows = self.settings, self.title, self.manifest.split("val")
        count = sum(parameter.numel() for parameter in trainable_parameters(self.model).values())
        rows = f"{len(self.manifest.split('train'))} train and {len(val_rows)} val samples"
        together = f", {self.processes.count} processes" if self.processes.count > 1 else ""
        say(f"{title}: {rows}, {count:,} trained parameters{together}")
        narrow_frozen(self.model, settings.precision)
        if settings.compile != "off":
            compile_backbones(self.model, settings.compile)
        self._begin()
        while self.at.epoch <= settings.epochs and self.at.since_best < settings.patience:
            if self.at.epoch:
                self._train_epoch()
            self._close_epoch(self.validate(val_rows) if val_rows else None)
        if self.at.since_best >= settings.patience:
            say(f"{title}: no better mAP in {settings.patience} validations, stopped")
        restore(self.model, self.best)
        self.write_best(self.best, self.best_notes)
        if self.processes.is_first:
            self.history.close()
        if self.best_notes["epoch"] == 0:
            say(f"{title}: the best mAP was that before the first step; training did not improve it")

    def write_best(self, parameters: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        if self.processes.is_first:
            write_checkpoint(self.folder.best, parameters, notes)

    def validate(self, rows: Sequence[Row]) -> dict[str, float]:
        """mAP and the other measures over all samples."""
        logits = predict_rows(self.model, rows, self.config, processes=self.processes, what="validate").logits
        labels, patients = np.array([row.label for row in rows]), [row.patient for row in rows]
        classes, multi_label = self.manifest.classes, self.manifest.multi_label
        measured = self.processes.first(
            lambda: summarise(logits, labels, patients, classes, multi_label=multi_label, bootstrap=0)
        )
        return {name: figure["value"] for name, figure in measured["overall"].items()}

    def _train_epoch(self) -> None:
        at, title = self.at, self.title
        self.model.train()
        before, started = at.seconds, time.perf_counter()
        steps = self.steps.of_epoch(at.epoch, start=at.batch)
        for batches in track(steps, f"{title}, epoch {at.epoch}", len(self.steps) - at.batch):
            at.lr = cyclic_learning_rate(at.step / len(self.steps), self.settings)
            set_learning_rate(self.optimizer, at.lr)
            values = self.step([batch.to(self.processes.device) for batch in batches])
            for name, value in values.items():
                at.losses.setdefault(name, []).append(value)
            at.images += sum(batch.image_count() for batch in batches)
            at.batch, at.step, at.seconds = at.batch + 1, at.step + 1, before + time.perf_counter() - started
            is_late = time.monotonic() - self.saved > 60 * self.settings.save_minutes
            self._save_if_asked(is_late)

    def _close_epoch(self, val: dict[str, float] | None) -> None:
        at = self.at
        images = sum(self.processes.gathered(at.images))
        record = {
            "epoch": at.epoch,
            "step": at.step,
            "lr": at.lr,
            "loss": {name: float(np.mean(values)) for name, values in at.losses.items()} or None,
            "val": val,
            "images_per_second": round(images / at.seconds, 2) if images else None,
            "seconds": round(at.seconds, 3),
            "memory_gib": round(max(self.processes.gathered(peak_memory(self.processes.device))), 3),
        }
        is_best = val is None or val["mAP"] > at.best
        if is_best:
            self.best, at.best = trained_state(self.model), (val["mAP"] if val else at.best)
            self.best_notes = {"epoch": at.epoch, "step": at.step, "val": val, **self.origin}
            self.write_best(self.best, self.best_notes)
        if self.processes.is_first:
            self.history.add(record)
        say(f"{self.title}, epoch {at.epoch}/{self.settings.epochs}" + _describe(record, is_best))
        self.at = Position(
            epoch=at.epoch + 1,
            step=at.step,
            best=at.best,
            since_best=0 if is_best else at.since_best + 1,
            records=at.records + 1,
            lr=at.lr,
        )
        self._save_if_asked(True)

    def _save_if_asked(self, is_due: bool) -> None:
        """Save if the first process finds it due, or if one was asked to stop, and then stop: all of them together."""
        due = is_due and self.processes.is_first
        number, save = self.processes.largest(torch.tensor([self.asked_to_stop() or 0, int(due)])).tolist()
        if number or save:
            self._save()
        if number:
            raise Interrupted(number)

    def _save(self) -> None:
        moments, numbers = optimizer_state(self.optimizer)
        states = self.processes.gathered(random_state(self.processes.device))
        tensors = {
            "parameters": trained_state(self.model),
            "best": self.best,
            "optimizer": moments,
            "random": {f"{name}.{index}": state for index, each in enumerate(states) for name, state in each.items()},
        }
        notes = {
            "position": asdict(self.at),
            "optimizer": numbers,
            "scaling": self.step.scaling(),
            "best": self.best_notes,
            "origin": self.origin,
            "environment": self._environment(),
        }
        # Two snapshots of one step: at the end of an epoch, and before the first step of the next.
        if self.processes.is_first:
            write_snapshot(self.folder.snapshots, Snapshot(2 * self.at.step + (self.at.batch == 0), tensors, notes))
        self.saved = time.monotonic()

    def _begin(self) -> None:
        """From the newest snapshot, if there is one."""
        processes, train_rows = self.processes, self.manifest.split("train")
        snapshot = processes.first(lambda: newest_snapshot(self.folder.snapshots))
        if snapshot is not None:
            self.stages.require_same_origin(snapshot.notes["origin"], self.folder)
            restore(self.model, snapshot.tensors["parameters"])
        self.steps = TrainingSteps(train_rows, self.config, index=processes.index, count=processes.count)
        weights = class_weights(train_rows, self.config.data)
        self.step = Step(
            model=self.model,
            optimizer=self.optimizer,
            settings=self.settings,
            processes=processes,
            gate_prior=self.gate_prior,
            class_weights=None if weights is None else weights.to(processes.device),
        )
        if processes.index:  # as the first, but for what dropout draws
            torch.manual_seed(self.settings.seed + processes.index)
        if snapshot is not None:
            self._compare_environment(snapshot.notes["environment"])
            self.at = Position(**snapshot.notes["position"])
            self.best, self.best_notes = snapshot.tensors["best"], snapshot.notes["best"]
            load_optimizer_state(self.optimizer, snapshot.tensors["optimizer"], snapshot.notes["optimizer"])
            self.step.set_scaling(snapshot.notes["scaling"])
            own = f".{processes.index}"
            states = {n.removesuffix(own): t for n, t in snapshot.tensors["random"].items() if n.endswith(own)}
            set_random_state(states, processes.device)
            say(f"{self.title}: going on in epoch {self.at.epoch} after step {self.at.step}")
        if processes.is_first:
            self.history = History(self.folder, tensorboard=self.settings.tensorboard, records=self.at.records)

    def _environment(self) -> dict[str, str]:
        count = self.processes.count
        at_once = self.settings.samples_at_once(count)
        return environment(self.processes.device) | {"processes": str(count), "samples at once": str(at_once)}

    def _compare_environment(self, was: Mapping[str, str]) -> None:
        now = self._environment()
        changed = [f"{name} (was {was.get(name)}, is {value})" for name, value in now.items() if was.get(name) != value]
        # The contrastive loss of a joint embedding is among the samples that a process takes through the model at once.
        if self.config.model.fusion == "joint" and was.get("samples at once") != now["samples at once"]:
            raise ValueError(
                f"{self.folder.path} was begun with {was.get('samples at once')} samples at once, now there are"
                f" {now['samples at once']}, and other negatives with them; go on with the --micro-batch and as many"
                " processes as before"
            )
        if changed:
            say(f"note: weights may differ in their last bits from those of an unbroken run: {', '.join(changed)}")


def class_weights(rows: Sequence[Row], data: DataConfig) -> Tensor | None:
    """What each class counts in the loss (C,), as ``data.balance`` says; None: all the same."""
    if data.balance == "auto":
        return inverse_frequencies(rows, len(data.classes))
    return torch.tensor(data.class_weights) if data.balance == "weights" else None


def _describe(record: dict[str, Any], is_best: bool) -> str:
    parts = []
    if record["loss"]:
        parts.append(f"loss {record['loss']['total']:.4f}")
    if record["val"]:
        parts.append(f"val mAP {record['val']['mAP']:.4f}" + (" (best)" if is_best else ""))
    if record["images_per_second"]:
        parts.append(f"{record['images_per_second']:.0f} images/s  {record['memory_gib']:.1f} GiB")
    return "".join(f"  {part}" for part in parts)
