"""Rows as samples: what is read, that chance depends on (seed, epoch, id) alone, and the order of an epoch."""

import math
import os
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ei.config import DataConfig
from ei.data import audit
from ei.data.dataset import (
    Draw,
    ManifestDataset,
    StepSampler,
    _hash,
    central_slices,
    epoch_order,
    random_slices,
)
from ei.data.images import ImageError
from ei.data.manifest import Row, read_manifest
from ei.data.sample import Batch, Sample, collate
from ei.data.transforms import evaluation_transform

CONFIG = DataConfig(modalities=("cfp", "oct"), image_size=16, slices=4)
# An image comes out as it is on disk, so that a value tells which file or slice it was.
BARE = replace(CONFIG, image_size=2, mean=(0, 0, 0), std=(1, 1, 1), rotation=0, crop=0, flip=0, jitter=0)


def row(number: int, label: int | tuple[int, ...] | None = 0, **images: Sequence[Path]) -> Row:
    files = {modality: tuple(paths) for modality, paths in images.items()}
    return Row(number=number, id=f"id{number}", patient=f"p{number}", split="train", label=label, images=files)


def labelled(*labels: int | tuple[int, ...]) -> list[Row]:
    return [row(number, label) for number, label in enumerate(labels)]


def grey(path: Path, level: int, size: tuple[int, int] = (2, 2)) -> Path:
    Image.new("L", size, level).save(path)
    return path


def volume(path: Path, count: int) -> Path:
    """Slice k has the level k."""
    np.save(path, np.arange(count, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(5, 2))
    return path


def dataset(rows: Sequence[Row], config: DataConfig = BARE, *, train: bool = False, seed: int = 0) -> ManifestDataset:
    return ManifestDataset(rows, config, multi_label=False, classes=("x", "y"), train=train, seed=seed)


def levels(sample: Sample, modality: str) -> list[int]:
    return sample.images[modality].mul(255).round()[:, 0, 0, 0].int().tolist()


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Six rows: cfp is one photo of noise; oct is a volume of 17 slices or three photos by turns."""
    noise = np.random.default_rng(0)
    found = []
    for number in range(6):
        photos = [tmp_path / f"{number}_{k}.png" for k in range(4)]
        for photo in photos:
            Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(photo)
        octs = photos[1:] if number % 2 else [volume(tmp_path / f"{number}.npy", 17)]
        found.append(row(number, number % 2, cfp=photos[:1], oct=octs))
    return found


# What a sample is


def test_evaluation_is_the_files_resized_and_normalised(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    config = replace(CONFIG, modalities=("cfp",))
    sample = dataset([row(0, 1, cfp=[tmp_path / "a.png"])], config)[0]
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    torch.testing.assert_close(sample.images["cfp"], evaluation_transform(config)(image)[None])
    assert sample.id == "id0"


def test_labels_are_integers_or_flags(tmp_path: Path) -> None:
    photo = grey(tmp_path / "a.png", 7)
    single = dataset([row(0, 1, cfp=[photo], oct=[photo])])[0].label
    several = ManifestDataset(
        [row(0, (0, 1, 1), cfp=[photo], oct=[photo])], BARE, multi_label=True, classes="abc", train=False, seed=0
    )[0].label
    absent = dataset([row(0, None, cfp=[photo], oct=[photo])])[0].label
    assert single is not None and several is not None and absent is None
    assert (single.shape, single.dtype, single.item()) == ((), torch.int64, 1)
    assert (several.dtype, several.tolist()) == (torch.float32, [0, 1, 1])


def test_only_the_modalities_of_the_configuration_are_read(tmp_path: Path) -> None:
    photo = grey(tmp_path / "a.png", 7)
    sample = dataset([row(0, cfp=[photo], oct=[tmp_path / "absent.png"])], replace(BARE, modalities=("cfp",)))[0]
    assert list(sample.images) == ["cfp"]


def test_mean_keeps_every_file_in_order(tmp_path: Path) -> None:
    photos = [grey(tmp_path / f"{level}.png", level, (2 + level, 3)) for level in (10, 20, 30)]
    for train in (False, True):
        sample = dataset([row(0, cfp=photos[:1], oct=photos)], train=train)[0]
        assert levels(sample, "oct") == [10, 20, 30]
        assert sample.images["oct"].shape == (3, 3, 2, 2)


def test_one_takes_the_first_at_evaluation_and_each_by_chance_in_training(tmp_path: Path) -> None:
    photos = [grey(tmp_path / f"{level}.png", level) for level in (10, 20, 30)]
    config = replace(BARE, images="one", modalities=("oct",))
    one_row = [row(0, oct=photos)]
    evaluation, training = dataset(one_row, config), dataset(one_row, config, train=True)
    assert [levels(evaluation[Draw(0, epoch)], "oct") for epoch in range(5)] == [[10]] * 5
    drawn = Counter(levels(training[Draw(0, epoch)], "oct")[0] for epoch in range(60))
    assert set(drawn) == {10, 20, 30}
    assert min(drawn.values()) > 8


@pytest.fixture
def checked_row(tmp_path: Path) -> Row:
    """Of a manifest that was read."""
    grey(tmp_path / "a.png", 7)
    (tmp_path / "m.csv").write_text("id,cfp\nfirst,a.png\n")
    config = replace(BARE, modalities=("cfp",))
    return read_manifest(tmp_path / "m.csv", config, classes=("x", "y"), labelled=False).rows[0]


def later(path: Path) -> None:
    """Another time of the inode, however coarse the clock."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        path.chmod(0o600)
        path.chmod(0o644)


@pytest.mark.fault("an image that changes after the check", "whoever reads it next stops; file and row named")
@pytest.mark.parametrize("how", ["written again", "replaced", "of the same size and time", "shorter", "directory"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changed_after_the_check_is_not_used(
    tmp_path: Path, checked_row: Row, how: str, workers: int
) -> None:
    path, state = tmp_path / "a.png", (tmp_path / "a.png").stat()
    loader = DataLoader(
        dataset([checked_row], replace(BARE, modalities=("cfp",))), collate_fn=collate, num_workers=workers
    )
    assert [batch.ids for batch in loader] == [["first"]]
    match how:
        case "written again":
            grey(path, 8)
        case "replaced":
            os.replace(grey(tmp_path / "b.png", 8), path)
        case "of the same size and time":
            later(path)
            content = path.read_bytes()
            path.write_bytes(grey(tmp_path / "b.png", 8).read_bytes())
            assert len(path.read_bytes()) == len(content)
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        case "shorter":
            path.write_bytes(path.read_bytes()[:20])
        case "directory":
            path.unlink()
            path.mkdir()
    reason = "is a directory" if how == "directory" else "has changed since the manifest was checked"
    batches = iter(loader)
    with pytest.raises(ImageError, match=rf"a\.png: {reason}.* \(row 2, id 'first'\)"):
        next(batches)
    assert not list(batches)  # to the end, which stops the worker at once


def test_a_file_that_only_looks_changed_is_used_and_read_once_for_that(
    tmp_path: Path, checked_row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").write_bytes(content)
    os.utime(tmp_path / "a.png", (1, 1))
    hashed: list[Path] = []
    sha256 = audit._sha256
    monkeypatch.setattr(audit, "_sha256", lambda path: hashed.append(path) or sha256(path))
    data = dataset([checked_row], replace(BARE, modalities=("cfp",)))
    for _ in range(3):
        assert levels(data[0], "cfp") == [7]
    assert hashed == [tmp_path / "a.png"]


def test_the_slices_of_a_checked_volume_are_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume(tmp_path / "a.npy", 17)
    (tmp_path / "m.csv").write_text("id,oct\nfirst,a.npy\n")
    config = replace(BARE, modalities=("oct",))
    row = read_manifest(tmp_path / "m.csv", config, classes=("x", "y"), labelled=False).rows[0]
    monkeypatch.setattr("ei.data.dataset.count_slices", None)
    assert levels(dataset([row], config)[0], "oct") == [2, 6, 10, 14]


@pytest.mark.fault("a volume of {count} slices where four are wanted", "slices are repeated, none invented")
@pytest.mark.parametrize(("count", "central"), [(1, [0]), (2, [0, 0, 0, 0]), (3, [0, 0, 1, 1]), (17, [2, 6, 10, 14])])
@pytest.mark.parametrize("images", ["mean", "one"])
def test_a_volume_gives_slices(tmp_path: Path, count: int, central: list[int], images: Literal["mean", "one"]) -> None:
    config = replace(BARE, modalities=("oct",), images=images)
    one_row = [row(0, oct=[volume(tmp_path / "a.npy", count)])]
    assert levels(dataset(one_row, config)[0], "oct") == central
    training = dataset(one_row, config, train=True)
    seen = [levels(training[Draw(0, epoch)], "oct") for epoch in range(80)]
    assert {len(slices) for slices in seen} == {len(central)}
    if count == 17:
        quarters = [{slices[k] for slices in seen} for k in range(4)]
        assert quarters == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15, 16}]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("images", ["mean", "one"])
def test_a_modality_that_the_row_lacks(tmp_path: Path, images: Literal["mean", "one"], train: bool) -> None:
    lacking = row(0, cfp=[grey(tmp_path / "a.png", 9)], oct=[])
    sample = dataset([lacking], replace(BARE, images=images), train=train)[0]
    assert sample.images["oct"].shape == (0, 3, 2, 2)
    assert levels(sample, "cfp") == [9]


def test_files_and_slices_add_up(tmp_path: Path) -> None:
    files = [volume(tmp_path / "a.npy", 17), grey(tmp_path / "b.png", 99), volume(tmp_path / "c.npy", 3)]
    sample = dataset([row(0, oct=files)], replace(BARE, modalities=("oct",)))[0]
    assert levels(sample, "oct") == [2, 6, 10, 14, 99, 0, 0, 1, 1]


def test_each_image_of_a_sample_is_augmented_on_its_own(tmp_path: Path) -> None:
    ramp = tmp_path / "ramp.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(ramp)
    sample = dataset([row(0, cfp=[ramp], oct=[ramp, ramp])], CONFIG, train=True)[0]
    first, second = sample.images["oct"]
    assert not torch.equal(first, second)
    assert not torch.equal(first, sample.images["cfp"][0])


@pytest.mark.fault("an image that vanishes, in a worker process too", "file and row named")
def test_a_file_that_vanished_is_an_error_in_a_worker_too(tmp_path: Path) -> None:
    photo = grey(tmp_path / "a.png", 7)
    data = dataset([row(0, cfp=[photo], oct=[tmp_path / "gone.png"]), row(1, cfp=[photo], oct=[photo])])
    for workers in (0, 1):
        batches = iter(DataLoader(data, collate_fn=collate, num_workers=workers))
        with pytest.raises(ImageError, match=r"gone\.png: does not exist \(row 0, id 'id0'\)"):
            next(batches)
        # To the end, which stops the worker at once; left to the garbage collector it takes five seconds.
        assert [batch.ids for batch in batches] == [["id1"]]


@pytest.mark.fault("NaN in an image that no check has seen", "stopped, file and row named")
def test_no_number_that_is_not_finite_becomes_a_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0.5, np.nan], [0, 1]]))
    with pytest.raises(ImageError, match=r"a\.npy: has float values from nan .* \(row 3, id 'id3'\)"):
        dataset([row(3, oct=[tmp_path / "a.npy"])], replace(BARE, modalities=("oct",)))[0]


@pytest.mark.fault("images of one level, all black volumes of one slice, a single pixel", "finite samples")
@pytest.mark.parametrize("shape", [(1, 1), (20, 1), (40, 50), (1, 40, 50), (2, 3, 5)])
@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("intensity", ["type", "percentiles"])
def test_images_that_show_nothing(tmp_path: Path, shape: tuple[int, ...], level: int, intensity: str) -> None:
    np.save(tmp_path / "a.npy", np.full(shape, level, np.uint8))
    np.save(tmp_path / "b.npy", np.full(shape, level, np.uint16))
    config = replace(CONFIG, modalities=("oct",), intensity=(intensity,))
    for train in (False, True):
        image = dataset([row(0, oct=[tmp_path / "a.npy", tmp_path / "b.npy"])], config, train=train)[0].images["oct"]
        assert image.isfinite().all() and image.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("count", [*range(1, 18), 61, 200])
def test_slices_lie_within_their_part_of_the_volume(count: int, wanted: int) -> None:
    torch.manual_seed(0)
    central, drawn = central_slices(count, wanted), random_slices(count, wanted)
    assert central == [math.floor(Fraction(2 * k + 1, 2) * (count - 1) / wanted) for k in range(wanted)]
    assert len(drawn) == wanted
    for k, index in enumerate(drawn):
        first = k * count // wanted
        assert first <= index <= max(first, (k + 1) * count // wanted - 1) < count


# Chance


def loaded(
    rows: Sequence[Row], workers: int, *, epochs: Sequence[int] = (0, 1), seed: int = 0, config: DataConfig = CONFIG
) -> list[Batch]:
    sampler = StepSampler(rows, seed=seed, batch_size=4, balance=True)
    loader: DataLoader[Sample] = DataLoader(
        dataset(rows, config, train=True, seed=seed),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    batches: list[Batch] = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        batches += loader
    return batches


def same(first: Batch, second: Batch) -> bool:
    return first.ids == second.ids and all(
        torch.equal(first.images[modality], second.images[modality])
        and torch.equal(first.present[modality], second.present[modality])
        for modality in first.images
    )


def test_the_number_of_workers_changes_nothing_even_when_they_outlive_an_epoch(rows: list[Row]) -> None:
    dropping = replace(CONFIG, modality_dropout=0.5)
    alone, shared = loaded(rows, 0, config=dropping), loaded(rows, 2, config=dropping)
    assert len(alone) == len(shared) == 4
    assert all(same(one, other) for one, other in zip(alone, shared, strict=True))


def test_epochs_can_be_had_in_any_order(rows: list[Row]) -> None:
    forward, second_only = loaded(rows, 0), loaded(rows, 0, epochs=[1])
    assert all(same(one, other) for one, other in zip(forward[2:], second_only, strict=True))


def test_what_a_sample_looks_like_depends_on_seed_epoch_id_and_repeat(rows: list[Row]) -> None:
    data = dataset(rows, CONFIG, train=True)
    image = data[Draw(0, epoch=3)].images["cfp"]
    data[1]
    torch.manual_seed(5)
    assert torch.equal(image, data[Draw(0, epoch=3)].images["cfp"])
    moved = dataset(rows[::-1], CONFIG, train=True)
    assert torch.equal(image, moved[Draw(len(rows) - 1, epoch=3)].images["cfp"])
    others = [
        data[Draw(0, epoch=2)],
        data[Draw(0, epoch=3, repeat=1)],
        dataset(rows, CONFIG, train=True, seed=1)[Draw(0, epoch=3)],
        dataset([replace(rows[0], id="other")], CONFIG, train=True)[Draw(0, epoch=3)],
    ]
    assert not any(torch.equal(image, other.images["cfp"]) for other in others)


def test_chance_is_the_same_in_every_process(rows: list[Row]) -> None:
    # Python's own hash of a string differs between processes.
    assert _hash(0, 3, "id0", 0, "oct") == 4012759023616854511
    data = dataset(rows, CONFIG, train=True)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[Draw(0, 3)].images["cfp"], data[Draw(0, 3)].images["cfp"])


def test_a_modality_looks_the_same_with_and_without_the_others(rows: list[Row]) -> None:
    both = dataset(rows, CONFIG, train=True)[0].images["oct"]
    alone = dataset(rows, replace(CONFIG, modalities=("oct",)), train=True)[0].images["oct"]
    assert torch.equal(both, alone)


def test_a_plain_index_is_the_first_epoch(rows: list[Row]) -> None:
    data = dataset(rows, CONFIG, train=True)
    assert torch.equal(data[2].images["cfp"], data[Draw(2)].images["cfp"])
    assert [dataset(rows, CONFIG)[k].id for k in range(6)] == [f"id{k}" for k in range(6)]


def test_loading_leaves_every_generator_as_it_was(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(rows, CONFIG, train=True)
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.random.get_rng_state()
    data[0]
    assert torch.equal(before, torch.random.get_rng_state())
    assert not seeded, "a GPU's generator was seeded, which would repeat the dropout of the model"


# Modality dropout

THREE = replace(BARE, modalities=("cfp", "faf", "oct"), modality_dropout=0.4)


@pytest.fixture
def trios(tmp_path: Path) -> list[Row]:
    """Two rows: the first has three modalities, the second lacks faf."""
    photo = grey(tmp_path / "a.png", 9)
    return [row(0, cfp=[photo], faf=[photo], oct=[photo]), row(1, cfp=[photo], faf=[], oct=[photo])]


def kept(sample: Sample) -> str:
    return "".join(modality[0] for modality, images in sample.images.items() if len(images))


def test_each_modality_is_left_out_as_often_as_asked_and_never_all(trios: list[Row]) -> None:
    data, draws = dataset(trios, THREE, train=True), 3000
    seen = Counter(kept(data[Draw(0, epoch)]) for epoch in range(draws))
    stay, goes = 0.6, 0.4
    shares = {"cfo": stay**3, "cf": stay**2 * goes, "co": stay**2 * goes, "fo": stay**2 * goes}
    shares |= dict.fromkeys("cfo", stay * goes**2 + goes**3 / 3)  # where all would go, each stays equally often
    for modalities, share in shares.items():
        assert abs(seen[modalities] / draws - share) < 4 * math.sqrt(share * (1 - share) / draws), modalities
    assert set(seen) == set(shares)
    assert {kept(data[Draw(1, epoch)]) for epoch in range(50)} == {"co", "c", "o"}


def test_what_is_left_out_depends_on_seed_epoch_id_and_repeat(trios: list[Row]) -> None:
    def pattern(rows: Sequence[Row] = trios, index: int = 0, repeat: int = 0, seed: int = 0) -> list[str]:
        data = dataset(rows, THREE, train=True, seed=seed)
        return [kept(data[Draw(index, epoch, repeat)]) for epoch in range(30)]

    assert pattern() == pattern() == pattern(trios[::-1], index=1)
    others = [pattern(repeat=1), pattern(seed=1), pattern([replace(trios[0], id="other")]), pattern()[::-1]]
    assert pattern() not in others


def test_what_stays_is_not_changed_by_what_is_left_out(rows: list[Row]) -> None:
    whole, dropping = dataset(rows, CONFIG, train=True), replace(CONFIG, modality_dropout=0.5)
    some = dataset(rows, dropping, train=True)
    patterns = set()
    for epoch in range(20):
        one, other = whole[Draw(0, epoch)], some[Draw(0, epoch)]
        patterns.add(kept(other))
        for modality, images in other.images.items():
            assert len(images) == 0 or torch.equal(images, one.images[modality])
    assert patterns == {"co", "c", "o"}


def test_nothing_is_left_out_of_evaluation_nor_of_a_modality_alone(trios: list[Row]) -> None:
    often = replace(THREE, modality_dropout=0.99)
    assert {kept(dataset(trios, often)[Draw(0, epoch)]) for epoch in range(20)} == {"cfo"}
    alone = dataset(trios, replace(often, modalities=("oct",)), train=True)
    assert {kept(alone[Draw(0, epoch)]) for epoch in range(20)} == {"o"}


def test_left_out_images_are_not_read(tmp_path: Path, trios: list[Row]) -> None:
    gone = replace(trios[0], images=trios[0].images | {"oct": (tmp_path / "gone.png",)})
    data = dataset([gone], THREE, train=True)
    patterns = [kept(dataset(trios, THREE, train=True)[Draw(0, epoch)]) for epoch in range(20)]
    without = next(epoch for epoch, pattern in enumerate(patterns) if "o" not in pattern)
    assert "o" not in kept(data[Draw(0, without)])


# The order of an epoch


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    table = labelled(*[0, 1] * 20)
    orders = [[draw.row for draw in epoch_order(table, seed=0, epoch=epoch)] for epoch in range(3)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(40))
    assert orders[1] == [draw.row for draw in epoch_order(table, seed=0, epoch=1)]
    assert orders[1] != [draw.row for draw in epoch_order(table, seed=1, epoch=1)]


def test_draws_carry_their_epoch_and_count_repeats() -> None:
    draws = epoch_order(labelled(0, 0, 0, 1), seed=0, epoch=5, balance=True)
    assert {draw.epoch for draw in draws} == {5}
    assert sorted(draw for draw in draws if draw.row == 3) == [(3, 5, 0), (3, 5, 1), (3, 5, 2)]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("counts", [[5], [3, 3], [9, 1], [7, 3, 2], [0, 4, 0, 9], [1, 8, 5, 3, 9]])
def test_balanced_classes_are_equally_frequent_and_use_every_row(counts: list[int], epoch: int) -> None:
    table = labelled(*[label for label, count in enumerate(counts) for _ in range(count)])
    drawn = Counter(draw.row for draw in epoch_order(table, seed=0, epoch=epoch, balance=True))
    per_class = Counter[int]()
    for row_index, copies in drawn.items():
        label = table[row_index].label
        assert isinstance(label, int)
        per_class[label] += copies
    assert set(drawn) == set(range(len(table)))
    assert set(per_class.values()) == {max(counts)}
    for label in per_class:
        copies_of = [drawn[index] for index, one in enumerate(table) if one.label == label]
        assert max(copies_of) - min(copies_of) <= 1


def test_which_rows_are_repeated_once_more_changes_with_the_epoch() -> None:
    table = labelled(*[0] * 30, *[1] * 20)
    extra = [
        frozenset(draw.row for draw in epoch_order(table, seed=0, epoch=epoch, balance=True) if draw.repeat)
        for epoch in range(3)
    ]
    assert {len(rows) for rows in extra} == {10}
    assert len(set(extra)) == 3


def test_rows_with_several_labels_are_repeated_for_the_rarest() -> None:
    # Counts: label 0 has 12, label 1 has 4, label 2 has 2.
    table = labelled(*[(1, 0, 0)] * 8, *[(1, 1, 0)] * 3, (1, 1, 1), (0, 0, 1), *[(0, 0, 0)] * 5)
    draws = epoch_order(table, seed=0, epoch=0, balance=True)
    copies = Counter(draw.row for draw in draws)
    assert [copies[index] for index in range(8)] == [1] * 8
    assert [copies[index] for index in range(8, 11)] == [3] * 3
    assert [copies[index] for index in (11, 12)] == [6, 6]
    assert [copies[index] for index in range(13, 18)] == [1] * 5


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("at_once", [None, 1, 2, 3, 50])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_step_is_dealt_out_once_whoever_takes_part(count: int, at_once: int | None, start: int) -> None:
    """The last step has 3 samples, so that of 8 processes five get one that does not count."""
    table = labelled(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1)
    order = epoch_order(table, seed=0, epoch=4, balance=True)
    steps = [order[k : k + 5] for k in range(5 * start, 16, 5)]
    found: list[list[Draw]] = [[] for _ in steps]
    for index in range(count):
        sampler = StepSampler(table, seed=0, batch_size=5, balance=True, at_once=at_once, index=index, count=count)
        sampler.set_epoch(4, start=start)
        assert sampler.steps == 4
        shares = list(sampler.shares())
        assert len(shares) == len(steps)
        assert list(sampler) == [draws for share in shares for draws in share.lists]
        assert len(sampler) == sum(len(share.lists) for share in shares)
        for number, share in enumerate(shares):
            assert all(0 < len(draws) <= (at_once or 5) for draws in share.lists)
            if share.counts:
                found[number] += [draw for draws in share.lists for draw in draws]
            else:
                assert share.lists == [steps[number][:1]]
    assert [sorted(step) for step in found] == [sorted(step) for step in steps]


def test_balance_needs_labels() -> None:
    with pytest.raises(ValueError, match="balance needs labels, but row 7 has none"):
        StepSampler([row(7, None)], seed=0, batch_size=1, balance=True)


@pytest.mark.parametrize(
    ("table", "multi_label", "message"),
    [
        ([row(0, 0), row(1, None)], False, "must all have a label, or none; 1 of 2 have one"),
        ([row(0, 0)], True, "multi_label is True, which does not fit the label 0"),
        ([row(0, (0, 1))], False, r"multi_label is False, which does not fit the label \(0, 1\)"),
        ([row(0, (0, 1, 1))], True, r"one value for each of 2 classes, got \(0, 1, 1\)"),
        ([row(0, 2)], False, "labels must be below the number of classes, 2, got 2"),
    ],
)
def test_labels_that_do_not_fit(table: list[Row], multi_label: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManifestDataset(table, BARE, multi_label=multi_label, classes=("x", "y"), train=False, seed=0)


def test_each_modality_has_its_own_black_and_white(tmp_path: Path) -> None:
    np.save(tmp_path / "ct.npy", np.full((4, 5), 40, np.int16))
    config = replace(BARE, intensity=("type", "-160:240"))
    sample = dataset([row(0, cfp=[grey(tmp_path / "a.png", 51)], oct=[tmp_path / "ct.npy"])], config)[0]
    assert sample.images["cfp"].mean().item() == pytest.approx(51 / 255)
    assert sample.images["oct"].mean().item() == pytest.approx(0.5)
