"""The optimiser: its schedule, and one step of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ei.config import TrainConfig
from ei.data.sample import Batch
from ei.losses import Shares, loss_terms, shares
from ei.processes import Processes
from ei.runtime import arithmetic

MOST_OVERFLOWS = 20
"""Steps in a row that fp16 may lose; each halves the scale of the loss, and 20 take it from 65,536 to below 1."""


class TrainingError(ArithmeticError):
    """Training cannot go on: a loss or gradient is not finite, or memory does not suffice."""


@dataclass
class Step:
    """One step of the optimiser, by all processes together; call it with this process's share of the samples.

    Args:
        model: In training mode, on the device of the process.
        optimizer: Of its trained parameters.
        settings: Weights of the losses, precision, whether the model is compiled.
        processes: Who else takes part.
        gate_prior: Modality that the fusion is pulled to; None for a single modality.
        class_weights: (C,), on the device; see :func:`ei.losses.classification_loss`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: TrainConfig
    processes: Processes
    gate_prior: str | None = None
    class_weights: Tensor | None = None
    overflows: int = 0  # steps in a row that fp16 has lost
    scaler: torch.amp.GradScaler = field(init=False)
    parallel: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self.settings.precision == "fp16")
        self.parallel = self.processes.parallel(self.model)

    def __call__(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Step once; the samples of all batches count as if they were one.

        Args:
            batches: With labels, on the device; taken through the model one after the other.

        Returns:
            The value of each term of the loss, over all processes.

        Raises:
            TrainingError: the loss or its gradient is not finite, or memory does not suffice; the weights are as
                before.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self._memory_explained(batches):
            each = [
                self._backward(batch, share, is_last=batch is batches[-1])
                for batch, share in zip(batches, shares(batches, self.processes.sum), strict=True)
            ]
        terms = torch.stack([torch.stack(list(terms.values())) for terms in each])  # (batches, terms)
        values = dict(zip(each[0], self.processes.sum(terms.sum(0)).tolist(), strict=True))
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        is_finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        # Checked before the step: what is not finite must never reach a weight.
        if not math.isfinite(values["total"]) or not (is_finite or self._may_overflow()):
            self._refuse(batches, terms, values["total"])
        self.overflows = 0 if is_finite else self.overflows + 1
        self.scaler.step(self.optimizer)  # which a scaler leaves out after an overflow
        self.scaler.update()
        return values

    def scaling(self) -> dict[str, Any]:
        """Where the scale of fp16 stands (JSON types)."""
        return {"scaler": self.scaler.state_dict(), "overflows": self.overflows}

    def set_scaling(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`scaling`."""
        self.scaler.load_state_dict(state["scaler"])
        self.overflows = state["overflows"]

    def _backward(self, batch: Batch, share: Shares, *, is_last: bool) -> dict[str, Tensor]:
        """Add the gradient of a batch; processes exchange gradients in the last."""
        settings = self.settings
        if settings.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # results of the step before may be overwritten
        assert batch.labels is not None
        with nullcontext() if is_last else self.processes.apart(self.parallel):
            with arithmetic(self.processes.device, settings.precision):
                output = self.parallel(batch)
            terms = loss_terms(
                output,
                batch.labels,
                aux_weight=settings.aux_weight,
                gate_weight=settings.gate_weight,
                gate_prior=self.gate_prior,
                shares=share,
                class_weights=self.class_weights,
            )
            # Shares are of all processes, whose gradients are averaged.
            self.scaler.scale(terms["total"] * self.processes.count).backward()
        return {name: term.detach() for name, term in terms.items()}

    def _may_overflow(self) -> bool:
        return self.scaler.is_enabled() and self.overflows < MOST_OVERFLOWS

    def _refuse(self, batches: Sequence[Batch], terms: Tensor, total: float) -> None:
        finite = terms.isfinite().all(1).tolist()
        own = [(name, ok) for batch, ok in zip(batches, finite, strict=True) if batch.counts for name in batch.ids]
        everywhere = [pair for pairs in self.processes.gathered(own) for pair in pairs]
        # Where only the gradient is at fault, it could have come from any of them.
        named = [name for name, ok in everywhere if not ok] or [name for name, _ in everywhere]
        raise TrainingError(
            f"the loss ({total}) or its gradient is not finite for the samples {', '.join(named)};"
            " nothing of it reached the weights. Look at their images, or lower lr"
        )

    @contextmanager
    def _memory_explained(self, batches: Sequence[Batch]) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            largest = max(map(len, batches))
            advice = (
                f"--micro-batch {largest // 2} takes fewer at once and leaves the batch of {self.settings.batch_size}"
                " as it is"
                if largest > 1
                else "a smaller --image-size or --precision bf16 needs less"
            )
            raise TrainingError(
                f"memory does not suffice for {largest} samples at once on {self.processes.device}: {advice};"
                " the same command then goes on from the last snapshot"
            ) from error


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
