"""The rows of a manifest as samples, and the order in which training sees them.

Shapes: I images per modality, S slices of a volume, C classes.

Nothing here depends on how many processes load, or on what was loaded before. The order of an epoch is a
function of (seed, epoch). What a sample looks like is a function of (seed, epoch, id, repeat, modality): the
sampler hands the epoch to the dataset with every index, so worker processes that outlive an epoch need not be
told of the next one.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ei.config import DataConfig
from ei.data.audit import require_unchanged
from ei.data.balance import repetitions
from ei.data.image_cache import ImageCache
from ei.data.images import ImageError, count_slices, read_image
from ei.data.manifest import Row
from ei.data.sample import Sample
from ei.data.transforms import evaluation_transform, training_transform
from ei.intensity import Intensity


class Draw(NamedTuple):
    """Which row to load, by its index, and which of its random versions."""

    row: int
    epoch: int = 0
    repeat: int = 0
    """How often this epoch has drawn the row before; so repeats of a rare class are augmented differently."""


class ManifestDataset(Dataset[Sample]):
    """Samples read from their files, one at a time.

    Args:
        rows: of a manifest, all labelled or none.
        config: modalities, images per sample, slices per volume, augmentation, modality dropout and size.
        multi_label: labels are (C,) float32 of 0 and 1, instead of () int64.
        classes: names of the classes, in the order of the labels.
        train: random augmentation, random slices and files; otherwise everything is fixed.
        seed: of all that is random.

    Indexing takes a :class:`Draw`, as :class:`StepSampler` gives them, or a plain index, which means the
    first epoch.

    Raises:
        ImageError: on indexing, when a file cannot be read, or has changed since its manifest was checked; the
            message names the row. No image is ever replaced by another.

    Example:
        With ``images="mean"`` and ``slices=4``, a row with two plain files of one modality and a volume of 17
        slices of another gives stacks of (2, 3, H, W) and (4, 3, H, W).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        config: DataConfig,
        *,
        multi_label: bool,
        classes: Sequence[str],
        train: bool,
        seed: int,
    ) -> None:
        _require_labels(rows, len(classes), multi_label)
        self.rows = tuple(rows)
        self.config = config
        self.multi_label = multi_label
        self.train = train
        self.seed = seed
        self.transform = training_transform(config) if train else evaluation_transform(config)
        self.cache = ImageCache(config.cache, self.transform) if config.cache else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw | int) -> Sample:
        index, epoch, repeat = draw if isinstance(draw, tuple) else Draw(draw)
        row = self.rows[index]
        if self.train and self.config.modality_dropout:
            row = row.only(self._kept(row, epoch, repeat))
        images = {}
        # Only the CPU's generator is forked and seeded: torch.manual_seed would reset the GPU's as well, and
        # with it the dropout of a model that trains in this process.
        with torch.random.fork_rng(devices=[]):
            for modality in self.config.modalities:
                torch.default_generator.manual_seed(_hash(self.seed, epoch, row.id, repeat, modality))
                try:
                    images[modality] = self._images(row, modality)
                except ImageError as error:
                    raise ImageError(f"{error} (row {row.number}, id {row.id!r})") from error
        return Sample(id=row.id, images=images, label=self._label(row))

    def _kept(self, row: Row, epoch: int, repeat: int) -> list[str]:
        """The modalities that modality dropout leaves of those that the sample has."""
        there = [modality for modality in self.config.modalities if row.images[modality]]
        generator = torch.Generator().manual_seed(_hash(self.seed, epoch, row.id, repeat, "modality", "dropout"))
        draws = torch.rand(len(there), generator=generator).tolist()
        # The largest always stays: where all would go, each modality is it equally often.
        least = min(self.config.modality_dropout, max(draws))
        return [modality for modality, draw in zip(there, draws, strict=True) if draw >= least]

    def _images(self, row: Row, modality: str) -> Tensor:
        files = row.images[modality]
        if not files:
            return torch.empty(0, 3, self.config.image_size, self.config.image_size)
        if self.config.images == "one":
            chosen = int(torch.randint(len(files), ())) if self.train else 0
            files = files[chosen : chosen + 1]
        intensity = self.config.intensity_of(modality)
        wanted = [(file, self._slices(_count(row, file))) for file in files]
        fixed = [image for file, slices in wanted for image in self._fixed(row, file, slices, intensity)]
        # Volumes of several files may differ in size; the transform makes them equal.
        return torch.stack([self.transform.varied(image) for image in fixed])

    def _fixed(self, row: Row, file: Path, slices: list[int], intensity: Intensity) -> list[Tensor]:
        if self.cache and file in row.checked:
            return self.cache.fixed(file, slices, intensity, row.checked[file])
        return [self.transform.fixed(image) for image in read_image(file, slices, intensity=intensity)]

    def _slices(self, count: int) -> list[int]:
        if count == 1:
            return [0]
        wanted = self.config.slices
        return random_slices(count, wanted) if self.train else central_slices(count, wanted)

    def _label(self, row: Row) -> Tensor | None:
        if row.label is None:
            return None
        return torch.tensor(row.label, dtype=torch.float32 if self.multi_label else torch.int64)


def _count(row: Row, file: Path) -> int:
    """Slices of a file that is still what it was when its manifest was checked, if it came from one."""
    if checked := row.checked.get(file):
        require_unchanged(file, checked)
        return checked.slices
    return count_slices(file)


def central_slices(count: int, wanted: int) -> list[int]:
    """The slices that stand for a volume at evaluation: floor((k + 0.5)(S - 1) / wanted), k = 0, 1, ...

    Args:
        count: S, slices of the volume.
        wanted: how many to take; of a volume with fewer, some are taken again.

    Source: arXiv 2603.17514, implementation details (its four slices of a knee).

    Example:
        ``central_slices(17, 4)`` is [2, 6, 10, 14]; ``central_slices(3, 4)`` is [0, 0, 1, 1].
    """
    return [(2 * k + 1) * (count - 1) // (2 * wanted) for k in range(wanted)]


def random_slices(count: int, wanted: int) -> list[int]:
    """One slice at random from each of ``wanted`` equal parts of a volume, by torch's global generator.

    A part of less than one slice gives the slice that it begins in.

    Source: arXiv 2603.17514, implementation details.

    Example:
        ``random_slices(16, 4)`` has one number from each of 0..3, 4..7, 8..11 and 12..15.
    """
    starts = [k * count // wanted for k in range(wanted + 1)]
    return [start + int(torch.randint(max(end - start, 1), ())) for start, end in pairwise(starts)]


def epoch_order(rows: Sequence[Row], *, seed: int, epoch: int, balance: bool = False) -> list[Draw]:
    """All rows of an epoch in random order, a function of (seed, epoch) and the rows alone.

    Args:
        rows: the training rows.
        seed: of the run.
        epoch: from 0.
        balance: repeat rows of rare classes, as :func:`ei.data.balance.repetitions` says; which of them, is drawn
            each epoch.

    Returns:
        Every row at least once; as many draws in every epoch.

    Example:
        Labels 0, 0, 0, 0, 1, 1, 1 with ``balance`` give eight draws: four of class 0, and of the rows of
        class 1 each once, one of them twice.
    """
    generator = torch.Generator().manual_seed(_hash(seed, epoch, "order"))
    copies = repetitions(rows, generator) if balance else [1] * len(rows)
    draws = [Draw(index, epoch, repeat) for index, count in enumerate(copies) for repeat in range(count)]
    return [draws[position] for position in torch.randperm(len(draws), generator=generator).tolist()]


class StepSampler(Sampler[list[Draw]]):
    """The draws of each step of the optimiser, dealt out to processes and cut to what goes through a model at once.

    For a DataLoader's ``batch_sampler``; call :meth:`set_epoch` before each pass. Which samples make up a step, and
    what they look like, does not depend on how many processes there are, nor on ``at_once``. The draws carry the epoch,
    so that no worker process needs to be told.

    Args:
        rows: The training rows.
        seed: Of the run.
        batch_size: Samples of a step, over all processes; the last step of an epoch may have fewer.
        balance: See :func:`epoch_order`.
        at_once: Most samples in one list; a step of more comes as several.
        index, count: This process, from 0, and how many there are.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        seed: int,
        batch_size: int,
        balance: bool = False,
        at_once: int | None = None,
        index: int = 0,
        count: int = 1,
    ) -> None:
        self.rows = tuple(rows)
        self.seed, self.balance = seed, balance
        self.batch_size, self.at_once = batch_size, at_once or batch_size
        self.index, self.count = index, count
        self.epoch = self.start = 0
        self.steps = math.ceil(len(epoch_order(rows, seed=seed, epoch=0, balance=balance)) / batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is ``epoch``, without its first ``start`` steps."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[Draw]]:
        for share in self.shares():
            yield from share.lists

    def __len__(self) -> int:
        return sum(len(share.lists) for share in self.shares())

    def shares(self) -> Iterator["Share"]:
        """This process's share of each step of the pass."""
        order = epoch_order(self.rows, seed=self.seed, epoch=self.epoch, balance=self.balance)
        for first in range(self.start * self.batch_size, len(order), self.batch_size):
            step = order[first : first + self.batch_size]
            own = step[self.index :: self.count]
            # All processes must take part in every step: one that gets nothing takes a sample that does not count.
            drawn = own or step[:1]
            yield Share([drawn[k : k + self.at_once] for k in range(0, len(drawn), self.at_once)], counts=bool(own))


class Share(NamedTuple):
    """What one process does in one step."""

    lists: list[list[Draw]]
    """One for each pass through the model."""
    counts: bool
    """Whether they are part of the loss."""


def _require_labels(rows: Sequence[Row], class_count: int, multi_label: bool) -> None:
    labels = [row.label for row in rows if row.label is not None]
    if len(labels) not in (0, len(rows)):
        raise ValueError(f"rows must all have a label, or none; {len(labels)} of {len(rows)} have one")
    for label in labels:
        if multi_label != isinstance(label, tuple):
            raise ValueError(f"multi_label is {multi_label}, which does not fit the label {label!r}")
        if isinstance(label, tuple) and len(label) != class_count:
            raise ValueError(f"labels must have one value for each of {class_count} classes, got {label!r}")
        if isinstance(label, int) and not 0 <= label < class_count:
            raise ValueError(f"labels must be below the number of classes, {class_count}, got {label}")


def _hash(*parts: int | str) -> int:
    """A seed; unlike Python's hash, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
