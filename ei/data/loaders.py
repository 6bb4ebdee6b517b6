"""Rows in, batches out: the two ways in which samples are loaded."""

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from ei.config import Config
from ei.data.dataset import EpochSampler, ManifestDataset
from ei.data.manifest import Row
from ei.data.sample import Sample, collate


def training_loader(rows: Sequence[Row], config: Config) -> tuple[DataLoader[Sample], EpochSampler]:
    """Augmented batches in an order of its own for every epoch, and the sampler that is told the epoch.

    Args:
        rows: The rows to train on.
        config: With ``data.classes`` in their final order.
    """
    sampler = EpochSampler(rows, seed=config.train.seed, balance=config.data.balance)
    return _loader(rows, config, sampler), sampler


def evaluation_loader(rows: Sequence[Row], config: Config) -> DataLoader[Sample]:
    """Every row once, in order, without augmentation."""
    return _loader(rows, config, None)


def _loader(rows: Sequence[Row], config: Config, sampler: EpochSampler | None) -> DataLoader[Sample]:
    dataset = ManifestDataset(
        rows,
        config.data,
        multi_label=config.data.multi_label,
        classes=config.data.classes,
        train=sampler is not None,
        seed=config.train.seed,
    )
    workers = config.train.workers
    return DataLoader(
        dataset,
        batch_size=config.train.batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Of its own, or each pass would move the generator that dropout draws from.
        generator=torch.Generator(),
    )
