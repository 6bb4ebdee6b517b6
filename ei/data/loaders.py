"""Rows in, batches out: the two ways in which samples are loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ei.config import Config
from ei.data.dataset import Draw, ManifestDataset, StepSampler
from ei.data.images import ImageError
from ei.data.manifest import Row
from ei.data.sample import Batch, Sample, collate


class TrainingSteps:
    """The steps of the optimiser in an epoch, each a list of augmented batches to take through the model one by one.

    Args:
        rows: The rows to train on.
        config: With ``data.classes`` in their final order.
        index, count: This process, from 0, and how many there are; each gets its share of every step.
    """

    def __init__(self, rows: Sequence[Row], config: Config, *, index: int = 0, count: int = 1) -> None:
        self.sampler = StepSampler(
            rows,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            balance=config.data.balance == "oversample",
            at_once=config.train.samples_at_once(count),
            index=index,
            count=count,
        )
        self.loader = _loader(rows, config, train=True, batch_sampler=self.sampler)

    def of_epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The steps of an epoch from number ``start``, in an order that is the epoch's own."""
        self.sampler.set_epoch(epoch, start)
        batches = iter(self.loader)
        for share in self.sampler.shares():
            yield [replace(batch, counts=share.counts) for batch in islice(batches, len(share.lists))]

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.sampler.steps


def evaluation_loader(rows: Sequence[Row], config: Config, *, count: int = 1) -> DataLoader[Batch]:
    """Every row once, in order, without augmentation, for one of ``count`` processes."""
    return _loader(rows, config, train=False, batch_size=config.train.samples_at_once(count))


def _loader(rows: Sequence[Row], config: Config, *, train: bool, **batches: Any) -> DataLoader[Batch]:
    dataset = ManifestDataset(
        rows,
        config.data,
        multi_label=config.data.multi_label,
        classes=config.data.classes,
        train=train,
        seed=config.train.seed,
    )
    workers = config.train.workers
    return _Loader(
        _Telling(dataset),
        collate_fn=_collated,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Of its own, or each pass would move the generator that dropout draws from.
        generator=torch.Generator(),
        **batches,
    )


class _Telling(Dataset[Sample | ImageError]):
    """Gives an error back where another data set raises it: from another process it would come as a traceback."""

    def __init__(self, dataset: ManifestDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: Draw | int) -> Sample | ImageError:
        try:
            return self.dataset[draw]
        except ImageError as error:
            return error

    def __len__(self) -> int:
        return len(self.dataset)


def _collated(samples: Sequence[Sample | ImageError]) -> Batch | ImageError:
    """A batch, or the first error."""
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    return collate([sample for sample in samples if isinstance(sample, Sample)])


class _Loader(DataLoader[Any]):
    """Raises the errors that it is given."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, ImageError):
                raise batch
            yield batch
