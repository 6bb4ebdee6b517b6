"""Train an injected model in two processes, and compare with one.

    PYTHONPATH=.:kernels python tests/mor/two_processes.py {ddp,fsdp} {vit,clip}

The rendezvous is a file, so that nothing listens on a port.
"""

import sys
import tempfile

import timm
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would keep; threads of it may abort a process that ends
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mor

STEPS = 2


def build(kind: str) -> tuple[nn.Module, nn.ModuleList]:
    torch.manual_seed(0)
    if kind == "vit":
        model = timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3
        )
        blocks = model.blocks
    else:
        import open_clip

        model = open_clip.transformer.VisionTransformer(16, 8, 32, 2, 2, 2.0, output_dim=8)
        blocks = model.transformer.resblocks
    mor.inject(model, "all", example=torch.randn(2, 3, 16, 16))
    for parameter in mor.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model, blocks


def train(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]


def work(process_index: int, how: str, kind: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process_index, world_size=2)
    compare(process_index, how, kind, folder)
    dist.barrier()
    dist.destroy_process_group()


def compare(process_index: int, how: str, kind: str, folder: str) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    alone, _ = build(kind)
    expected = train(alone, images)

    model, blocks = build(kind)
    if how == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    # The mean over the batch is the mean of the processes' means.
    found = train(wrapped, images.chunk(2)[process_index])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), atol=1e-5, rtol=1e-4)

    mor.save(model, f"{folder}/{process_index}")
    fresh, _ = build(kind)
    mor.load(fresh, f"{folder}/{process_index}")
    torch.testing.assert_close(fresh(images), alone(images), atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(*sys.argv[1:3], folder), nprocs=2)
    print("same as one process")
