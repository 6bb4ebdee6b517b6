"""What test_processes.py runs in several processes, and in one to compare with.

    torchrun --standalone --nproc-per-node 2 tests/ei/several_processes.py CONFIG FOLDER OTHER_RUN
    torchrun --standalone --nproc-per-node 2 tests/ei/several_processes.py CONFIG FOLDER [killed|SIGTERM|SIGINT|nan]

The first writes FOLDER/gradients.safetensors, trains into FOLDER/run, and evaluates another run again and predicts
with it. The second is
``ei train``, broken in one way.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ei import evaluate, predict, train
from ei.cli import run as command_line
from ei.config import Config
from ei.data.loaders import TrainingSteps
from ei.data.manifest import read_manifest
from ei.data.sample import Batch
from ei.models import build_model
from ei.optimisation import Step
from ei.processes import Processes
from ei.runs.loading import load_trunk
from ei.runs.setup import resolved
from mor import trainable_parameters


def gradients(config: Config, processes: Processes) -> dict[str, torch.Tensor]:
    """Of every step of an epoch of the second stage, without dropout, with weights that stay."""
    config = replace(config, model=replace(config.model, dropout=0.0))
    manifest = read_manifest(config.data.manifest, config.data)
    config = resolved(config, manifest)
    torch.manual_seed(0)
    model = build_model(config, len(manifest.classes), trunk=load_trunk(config))
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.0)
    step = Step(model, optimizer, config.train, processes, gate_prior="oct")
    steps = TrainingSteps(manifest.split("train"), config, index=processes.index, count=processes.count)
    found = {}
    for number, batches in enumerate(steps.of_epoch(1)):
        values = step(batches)
        found[f"{number} loss"] = torch.tensor(values["total"])
        for name, parameter in trainable_parameters(model).items():
            found[f"{number} {name}"] = parameter.grad.clone()
    return found


def broken(how: str) -> None:
    """Let the ninth step of this program end as ``how`` says."""
    take, taken = Step.__call__, []

    def breaking(self: Step, batches: Sequence[Batch]) -> dict[str, float]:
        taken.append(True)
        if len(taken) == 9:
            if how == "killed" and not self.processes.is_first:
                os.kill(os.getpid(), signal.SIGKILL)
            if how.startswith("SIG") and self.processes.is_first:
                os.kill(os.getppid(), signal.Signals[how])  # torchrun, which hands it on
            if how == "nan" and not self.processes.is_first:
                modality = next(iter(batches[0].images))
                batches[0].images[modality][0] = float("nan")
        return take(self, batches)

    Step.__call__ = breaking


def main(config_file: str, folder: str, how: str = "") -> int:
    run = Path(folder) / "run"
    if how:
        broken(how)
    code = command_line(["train", "--config", config_file, "--out", str(run), "--device", "cpu"])
    if code == 0:
        require_no_threads_of_gloo()
    return code


def compared(config_file: str, folder: str, other_run: str) -> None:
    config = Config.load(Path(config_file))
    processes = Processes.join("cpu")
    found = gradients(config, processes)
    if processes.is_first:
        save_file(found, Path(folder) / "gradients.safetensors")
    train(config, Path(folder) / "run")
    evaluate(other_run)
    predict(other_run, config.data.manifest, Path(folder) / "predicted.csv")
    processes.leave()
    require_no_threads_of_gloo()


def require_no_threads_of_gloo() -> None:
    """Which can end a process with SIGABRT as Python ends, rarely, and then after all work is done."""
    if sys.platform == "linux":
        names = [thread.joinpath("comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
        assert not [name for name in names if "gloo" in name], names


if __name__ == "__main__":
    if len(sys.argv) > 3 and Path(sys.argv[3]).is_dir():
        compared(*sys.argv[1:])
    else:
        sys.exit(main(*sys.argv[1:]))
