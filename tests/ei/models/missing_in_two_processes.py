"""A model in two processes, whose batches lack different modalities; the gradients are those of one process.

    PYTHONPATH=.:kernels python tests/ei/models/missing_in_two_processes.py

The rendezvous is a file, so that nothing listens on a port.
"""

import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mor
from ei.config import Config, DataConfig, ModelConfig
from ei.data.sample import Batch, Sample, collate
from ei.models import build_model

MODALITIES = ("cfp", "oct")
# The batches of both processes, step by step: what each of their samples has.
STEPS = [(["c", "c", "c"], ["co", "o", "co"]), (["co", "o"], ["c", "c"]), (["c"], ["o"]), (["co"], ["co"])]


def build(fusion: str) -> nn.Module:
    torch.manual_seed(0)
    config = Config(
        data=DataConfig(modalities=MODALITIES, image_size=8),
        model=ModelConfig(backbone="tiny", fusion=fusion, detach_fusion=False),
    )
    model = build_model(config, num_classes=3)
    for name, parameter in mor.trainable_parameters(model).items():
        if name.endswith("mor_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def batch_of(step: int, process: int) -> Batch:
    generator = torch.Generator().manual_seed(2 * step + process)
    return collate(
        [
            Sample(str(row), {m: torch.randn(int(m[0] in has), 3, 8, 8, generator=generator) for m in MODALITIES})
            for row, has in enumerate(STEPS[step][process])
        ]
    )


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of a loss in which absent modalities have no part; as many samples as the process has."""
    model.zero_grad()
    output = model(batch)
    loss = output.logits.square().mean()
    for each in (output.modality_logits, output.aux_logits):
        loss = loss + sum((logits.square().mean(1) * batch.has(name)).mean() for name, logits in each.items())
    loss.backward()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: parameter.grad.clone() for name, parameter in mor.trainable_parameters(inner).items()}


def work(process: int, folder: str) -> None:
    timeout = timedelta(seconds=60)  # whoever waits for a gradient that never comes fails, instead of waiting on
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2, timeout=timeout)
    for fusion in ("ei", "late"):
        compare(process, fusion)
    dist.destroy_process_group()


def compare(process: int, fusion: str) -> None:
    alone = build(fusion)
    wrapped = DistributedDataParallel(build(fusion), find_unused_parameters=False)
    for step in range(len(STEPS)):
        found = gradients(wrapped, batch_of(step, process))
        mine, others = (gradients(alone, batch_of(step, number)) for number in (process, 1 - process))
        for name, gradient in found.items():
            expected = (mine[name] + others[name]) / 2
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=f"{fusion}, step {step}, {name}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        # Forked, because importing everything takes longer than all the rest.
        mp.start_processes(work, args=(folder,), nprocs=2, start_method="fork")
    print("the same gradients as in one process")
