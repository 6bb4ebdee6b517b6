"""One step, on models small enough to see what it did."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ei.config import TrainConfig
from ei.data.sample import Batch
from ei.models.output import Output
from ei.optimisation import MOST_OVERFLOWS, Step, TrainingError
from ei.processes import Processes

SETTINGS = TrainConfig(batch_size=8, lr=0.1, lr_low=0.1, momentum=0.0, weight_decay=0.0)
ALONE = Processes(torch.device("cpu"))


class Pixels(nn.Module):
    """A linear classifier of 2 x 2 px; remembers how many samples it saw at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(12, 3)
        self.seen: list[int] = []
        self.fails_above, self.error = 10**6, RuntimeError()

    def forward(self, batch: Batch) -> Output:
        self.seen.append(len(batch))
        if len(batch) > self.fails_above:
            raise self.error
        logits = self.head(batch.images["oct"].mean(1).flatten(1))
        return Output(logits, {"oct": logits})


def batch(samples: int, *, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images={"oct": torch.randn(samples, 1, 3, 2, 2, generator=generator)},
        present={"oct": torch.ones(samples, 1, dtype=torch.bool)},
        labels=torch.arange(samples) % 3,
        ids=[f"row{number}" for number in range(samples)],
    )


def part(whole: Batch, rows: slice) -> Batch:
    return Batch(
        {name: images[rows] for name, images in whole.images.items()},
        {name: present[rows] for name, present in whole.present.items()},
        whole.labels[rows],
        whole.ids[rows],
    )


def stepper(model: nn.Module, settings: TrainConfig = SETTINGS, **more: object) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    return Step(model, optimizer, settings, ALONE, **more)


def test_gradients_of_parts_are_those_of_the_whole() -> None:
    """Parts of 3, 3 and 2 samples, which a mean of their means would weigh wrongly."""
    whole, cut = Pixels(), Pixels()
    weights = torch.tensor([1.0, 5.0, 0.2])
    values = stepper(whole, class_weights=weights)([batch(8)])
    parts = [part(batch(8), rows) for rows in (slice(0, 3), slice(3, 6), slice(6, 8))]
    others = stepper(cut, class_weights=weights)(parts)
    assert cut.seen == [3, 3, 2] and values == pytest.approx(others, rel=1e-6)
    assert not torch.equal(whole.head.weight, Pixels().head.weight)
    torch.testing.assert_close(whole.head.weight, cut.head.weight)


def test_what_does_not_count_changes_nothing() -> None:
    with_it, without = Pixels(), Pixels()
    stepper(with_it)([batch(4), replace(batch(4, seed=2), counts=False)])
    stepper(without)([batch(4)])
    torch.testing.assert_close(with_it.head.weight, without.head.weight, rtol=0, atol=0)


@pytest.mark.fault("out of memory", "says which --micro-batch to take; the batch stays")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    ],
)
def test_too_little_memory_suggests_a_micro_batch(error: RuntimeError) -> None:
    model = Pixels()
    model.fails_above, model.error = 4, error
    before = model.head.weight.clone()
    with pytest.raises(
        TrainingError, match="for 8 samples at once on cpu: --micro-batch 4 takes fewer at once and leaves"
    ):
        stepper(model)([batch(8)])
    assert torch.equal(model.head.weight, before)
    stepper(model)([part(batch(8), rows) for rows in (slice(0, 4), slice(4, 8))])
    model.fails_above = 0
    with pytest.raises(TrainingError, match="a smaller --image-size or --precision bf16"):
        stepper(model)([batch(1)])


def test_another_error_is_not_taken_for_one_of_memory() -> None:
    model = Pixels()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        stepper(model)([replace(batch(2), images={"oct": torch.zeros(2, 1, 3, 5, 5)})])


class Large(nn.Module):
    """Its gradient is finite in fp32, and not once the loss is scaled for fp16."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.zeros(3)), factor

    def forward(self, batch: Batch) -> Output:
        class Narrow(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                return (gradient * self.factor).half().float() / self.factor

        logits = Narrow.apply(self.weight.expand(len(batch), 3))
        return Output(logits, {"oct": logits})


def test_fp16_lowers_its_scale_until_gradients_are_finite() -> None:
    """65504 is the largest number of fp16; the first scale of the loss is 65536."""
    model = Large(64.0)
    step = stepper(model, replace(SETTINGS, precision="fp16"))
    lost = 0
    while not model.weight.detach().abs().sum():
        lost = step.overflows
        step([batch(8)])
    assert 1 < lost + 1 < 10 and step.overflows == 0
    other = stepper(Large(64.0), replace(SETTINGS, precision="fp16"))
    other.set_scaling(step.scaling())
    assert other.scaler.get_scale() == step.scaler.get_scale() < 65536


@pytest.mark.fault("gradients that overflow in fp16 at any scale", "stopped after twenty steps, samples named")
def test_fp16_gives_up() -> None:
    model = Large(float("inf"))
    step = stepper(model, replace(SETTINGS, precision="fp16"))
    for _ in range(MOST_OVERFLOWS):
        step([batch(8)])
    with pytest.raises(TrainingError, match="not finite for the samples row0, row1"):
        step([batch(8)])
    assert torch.equal(model.weight, torch.zeros(3))


def test_samples_are_named_by_the_part_that_is_at_fault() -> None:
    parts = [part(batch(8), rows) for rows in (slice(0, 3), slice(3, 6), slice(6, 8))]
    parts[1].images["oct"][2] = float("nan")
    with pytest.raises(TrainingError, match=r"for the samples row3, row4, row5;"):
        stepper(Pixels())(parts)
