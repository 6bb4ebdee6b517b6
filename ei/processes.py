"""The processes that train or evaluate together, as torchrun starts them; usually it is one alone.

accelerate finds out who is there and which device is whose. What only one may do, such as writing files, the first
process does; what they must agree on, they tell each other.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ei.interrupts import ElsewhereError
from ei.runtime import choose_device

Value = TypeVar("Value")

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others, such as for a first reading of all images."""


@dataclass(frozen=True)
class Processes:
    """This process (``index`` of ``count``) and its device."""

    device: torch.device
    count: int = 1
    index: int = 0

    @classmethod
    def join(cls, device: str) -> "Processes":
        """Meet the others, if torchrun has started several; may be called again.

        Args:
            device: A name for :func:`ei.runtime.choose_device`. Of several processes each takes the GPU of its own
                with "auto" or "cuda"; with "cpu" all share it.

        Raises:
            ValueError: the device cannot be used, or not by several processes.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(choose_device(device))
        if device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"device must be auto, cuda or cpu with several processes, got '{device}'")
        choose_device(device)
        # Keeps the group that it finds as it is imported, for good; DistributedDataParallel would import it too late.
        import torch.distributed.nn
        from accelerate import PartialState

        together = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(together.device, together.num_processes, together.process_index)

    @staticmethod
    def leave() -> None:
        """End what :meth:`join` began, once all is done; whoever joined must do so before Python ends.

        A thread of gloo may still hold a tensor of the last message, and would end a process that has succeeded with
        SIGABRT (pytorch issue 190489). Not for a process that fails: NCCL might wait there for the others, who wait
        for torchrun to tell them.
        """
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def first(self, work: Callable[[], Value]) -> Value:
        """What ``work`` gives in the first process; the others wait for it.

        Raises:
            ElsewhereError: in the others, if it fails in the first.
        """
        if self.count == 1:
            return work()
        told: list[Any] = [None, False]
        if self.is_first:
            try:
                told = [work(), True]
            finally:
                dist.broadcast_object_list(told, src=0)
        else:
            dist.broadcast_object_list(told, src=0)
        result, succeeded = told
        if not succeeded:
            raise ElsewhereError
        return result

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process is through before the others begin, which then find what it has left."""
        if not self.is_first:
            self.first(lambda: None)
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.is_first and self.count > 1:
                dist.broadcast_object_list([None, not failed], src=0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """The largest over all processes, element by element, in each of them."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes in their order, in each of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as it is to be called in training, so that gradients are means over the processes."""
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.15 has another name for broadcast_buffers, which older ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def apart(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the gradients of a :meth:`parallel` model stay those of this process."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        if self.count == 1:
            return values
        values = values.detach().to(self.device, copy=True)
        dist.all_reduce(values, how)
        return values
