"""Every baseline in two processes, through steps whose samples lack modalities; the gradients are those of one process.

    PYTHONPATH=.:kernels python tests/ei/baselines/fusions_in_two_processes.py

The rendezvous is a file, so that nothing listens on a port.
"""

import tempfile
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ei.baselines import BASELINES
from ei.config import BaselineConfig, Config, DataConfig, ModelConfig
from ei.data.sample import Batch, Sample, collate
from ei.models import build_model
from ei.optimisation import Step
from ei.processes import Processes
from mor import trainable_parameters

MODALITIES = ("cfp", "oct")
# The batches of both processes, step by step: what each of their samples has. In the last, the second has none.
STEPS = [(["co", "c", "co"], ["co", "o", "co"]), (["c", "c"], ["o"]), (["co", "co"], [])]
SMALL = {
    "mm-mil": {"mil_heads": 2, "mil_hidden": 8},
    "sfusion": {"sfusion_layers": 1, "sfusion_heads": 2, "sfusion_grid": 2, "sfusion_dropout": 0.0},
    "mmrad": {"mmrad_heads": 2, "mmrad_mlp": 16, "mmrad_prompt_width": 8},
    "cross": {"cross_width": 16, "cross_heads": 2},
    "joint": {"joint_width": 16},
}


def samples(step: int, process: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(2 * step + process)
    return [
        Sample(
            f"{process}-{row}",
            {name: torch.randn(int(name[0] in has), 3, 8, 8, generator=generator) for name in MODALITIES},
            torch.tensor(row % 3),
        )
        for row, has in enumerate(STEPS[step][process])
    ]


def batch_of(step: int, process: int) -> Batch:
    """With a sample that does not count where the process has none, as :class:`ei.data.loaders.TrainingSteps` does."""
    own = samples(step, process)
    return replace(collate(own or samples(step, 1 - process)[:1]), counts=bool(own))


def step_of(fusion: str, processes: Processes) -> Step:
    """One whose learning rate is zero, of the same model every time."""
    torch.manual_seed(0)
    config = Config(
        data=DataConfig(modalities=MODALITIES, image_size=8),
        model=ModelConfig(backbone="tiny", fusion=fusion),
        baseline=BaselineConfig(**SMALL.get(fusion, {})),
    )
    model = build_model(config, num_classes=3)
    for name, parameter in trainable_parameters(model).items():
        if name.endswith("mor_B"):
            nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.0)
    return Step(model, optimizer, config.train, processes)


def gradients(step: Step, batches: list[Batch]) -> dict[str, Tensor]:
    """And the value of the loss."""
    loss = torch.tensor(step(batches)["total"])
    return {"loss": loss, **{name: item.grad.clone() for name, item in trainable_parameters(step.model).items()}}


def work(process: int, folder: str, fusions: list[str]) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)  # whoever waits for a gradient that never comes fails, instead of waiting on
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2, timeout=timeout)
    device = torch.device("cpu")
    for fusion in fusions:
        together, alone = step_of(fusion, Processes(device, 2, process)), step_of(fusion, Processes(device))
        for number in range(len(STEPS)):
            found = gradients(together, [batch_of(number, process)])
            one_by_one = gradients(alone, [batch_of(number, 0), batch_of(number, 1)])
            at_once = gradients(alone, [collate(samples(number, 0) + samples(number, 1))])
            require_equal(f"{fusion}, step {number}", found, one_by_one)
            if fusion != "joint":  # whose negatives are the samples that go through the model at once
                require_equal(f"{fusion}, step {number}, at once", found, at_once)
            elif number == 0:
                assert (found["loss"] - at_once["loss"]).abs() > 1e-3
    dist.destroy_process_group()


def require_equal(where: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=f"{where}, {name}")


if __name__ == "__main__":
    fusions = [name for name in BASELINES if name != "mmrad" or find_spec("transformers")]
    with tempfile.TemporaryDirectory() as folder:
        # Forked, because importing everything takes longer than all the rest.
        mp.start_processes(work, args=(folder, fusions), nprocs=2, start_method="fork")
    print("the same gradients as in one process")
