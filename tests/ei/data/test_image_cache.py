"""With and without the cache every image is the same, bit for bit, whatever happens to the folder."""

import errno
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import ei.data.image_cache as image_cache
from ei.config import DataConfig
from ei.data.dataset import Draw, ManifestDataset
from ei.data.manifest import Row, read_manifest
from ei.data.sample import collate

# Images of more than 32 px are shrunk before chance begins.
CONFIG = DataConfig(modalities=("oct",), image_size=16, slices=3)
EVALUATED, TRAINED = False, True


def noise(*shape: int, dtype: type = np.uint8) -> NDArray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def picture(path: Path, *shape: int, dtype: type = np.uint8, **options: object) -> None:
    Image.fromarray(noise(*shape, dtype=dtype)).save(path, **options)


def pages(path: Path) -> None:
    first, *rest = [Image.fromarray(page) for page in noise(5, 40, 50)]
    first.save(path, save_all=True, append_images=rest)


def nifti(path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(noise(40, 50, 7), np.eye(4)), path)


def dicom(path: Path) -> None:
    data = pytest.importorskip("pydicom.data")
    shutil.copy(data.get_testdata_file("CT_small.dcm"), path)


FORMATS: dict[str, Callable[[Path], None]] = {
    "grey.png": lambda path: picture(path, 40, 50),
    "colour.png": lambda path: picture(path, 40, 50, 3),
    "small.png": lambda path: picture(path, 10, 12, 3),
    "square.png": lambda path: picture(path, 16, 16),
    "alpha.png": lambda path: picture(path, 40, 50, 4),
    "deep.png": lambda path: picture(path, 40, 50, dtype=np.uint16),
    "photo.jpg": lambda path: picture(path, 70, 50, 3),
    "small.jpeg": lambda path: picture(path, 20, 20, 3),
    "plain.tif": lambda path: picture(path, 40, 50, 3),
    "deflated.tif": lambda path: picture(path, 40, 50, dtype=np.uint16, compression="tiff_adobe_deflate"),
    "pages.tif": pages,
    "volume.npy": lambda path: np.save(path, noise(7, 40, 50)),
    "photo.npy": lambda path: np.save(path, noise(40, 50, 3)),
    "volume.nii": nifti,
    "volume.nii.gz": nifti,
    "slice.dcm": dicom,
}
NEVER_KEPT = ("volume.npy", "photo.npy", "volume.nii")


def rows_of(folder: Path, names: Sequence[str], config: DataConfig = CONFIG) -> list[Row]:
    lines = ["id,oct", *(f"r{number},{name}" for number, name in enumerate(names))]
    (folder / "m.csv").write_text("\n".join(lines))
    return list(read_manifest(folder / "m.csv", config, classes=("x", "y"), labelled=False).rows)


def dataset(rows: Sequence[Row], config: DataConfig, cache: Path | None, train: bool) -> ManifestDataset:
    config = replace(config, cache=str(cache or ""))
    return ManifestDataset(rows, config, multi_label=False, classes=("x", "y"), train=train, seed=0)


def images(
    rows: Sequence[Row], cache: Path | None, train: bool = EVALUATED, config: DataConfig = CONFIG
) -> list[Tensor]:
    """Of three epochs."""
    data = dataset(rows, config, cache, train)
    return [data[Draw(number, epoch)].images["oct"] for epoch in range(3) for number in range(len(rows))]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.fixture
def photos(tmp_path: Path) -> list[Row]:
    """Four colour photos that are shrunk."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return rows_of(tmp_path, [f"{number}.png" for number in range(4)])


@pytest.mark.parametrize("train", [EVALUATED, TRAINED])
@pytest.mark.parametrize("intensity", ["type", "percentiles", "0:200"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_same_with_and_without(tmp_path: Path, name: str, intensity: str, train: bool) -> None:
    FORMATS[name](tmp_path / name)
    config = replace(CONFIG, intensity=(intensity,))
    if name == "slice.dcm" and intensity == "type":
        config = replace(CONFIG, intensity=("-1000:1000",))  # it has no window
    rows, cache = rows_of(tmp_path, [name], config), tmp_path / "cache"
    plain = images(rows, None, train, config)
    for _ in range(2):  # written, then read
        assert_same(images(rows, cache, train, config), plain)
    kept = bool(entries(cache))
    assert kept == (name not in NEVER_KEPT and not (train and name == "small.jpeg"))


@pytest.mark.parametrize("train", [EVALUATED, TRAINED])
def test_what_is_there_is_not_decoded_again(
    tmp_path: Path, photos: list[Row], monkeypatch: pytest.MonkeyPatch, train: bool
) -> None:
    first = images(photos, tmp_path / "cache", train)
    assert len(entries(tmp_path / "cache")) == 4
    monkeypatch.setattr(image_cache, "read_image", None)
    assert_same(images(photos, tmp_path / "cache", train), first)


def test_only_the_slices_that_are_not_there_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages(tmp_path / "a.tif")
    rows, cache = rows_of(tmp_path, ["a.tif"]), tmp_path / "cache"
    read, asked = image_cache.read_image, []

    def watched(path: Path, slices: Sequence[int], **options: object) -> Tensor:
        asked.append(list(slices))
        return read(path, slices, **options)

    monkeypatch.setattr(image_cache, "read_image", watched)
    images(rows, cache)
    assert asked == [[0, 2, 3]]
    seven = replace(CONFIG, slices=7)
    assert_same(images(rows, cache, config=seven), images(rows, None, config=seven))
    assert asked == [[0, 2, 3], [1]]


def test_files_are_known_by_their_content(tmp_path: Path, photos: list[Row]) -> None:
    """A renamed one is there, an edited one is not what it was, and a copy is no other."""
    cache = tmp_path / "cache"
    before = images(photos, cache)
    os.rename(tmp_path / "0.png", tmp_path / "renamed.png")
    shutil.copy(tmp_path / "1.png", tmp_path / "copy.png")
    assert_same(images(rows_of(tmp_path, ["renamed.png", "copy.png"]), cache)[:2], before[:2])
    assert len(entries(cache)) == 4
    Image.fromarray(noise(60, 50, 3)[::-1]).save(tmp_path / "1.png")
    edited = rows_of(tmp_path, ["1.png"])
    assert_same(images(edited, cache), images(edited, None))
    assert not torch.equal(images(edited, cache)[0], before[1])
    assert len(entries(cache)) == 5


@pytest.mark.parametrize(
    "other",
    [
        {"image_size": 17},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"intensity": ("0:100",)},
        {"intensity": ("percentiles",)},
    ],
)
def test_other_settings_have_entries_of_their_own(tmp_path: Path, other: dict) -> None:
    picture(tmp_path / "a.png", 40, 50, dtype=np.uint16)
    cache, rows = tmp_path / "cache", rows_of(tmp_path, ["a.png"])
    config = replace(CONFIG, **other)
    images(rows, cache)
    assert_same(images(rows, cache, config=config), images(rows, None, config=config))
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("what", ["_versions", "capability"])
def test_other_libraries_and_processors_have_entries_of_their_own(
    tmp_path: Path, photos: list[Row], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    cache = tmp_path / "cache"
    images(photos, cache)
    if what == "capability":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    else:
        assert any(name.startswith("pillow 1") for name in image_cache._versions())
        monkeypatch.setattr(image_cache, "_versions", lambda: ("torch 9",))
    images(photos, cache)
    assert len(entries(cache)) == 8


def test_training_and_evaluation_have_entries_of_their_own(tmp_path: Path, photos: list[Row]) -> None:
    cache = tmp_path / "cache"
    trained, evaluated = images(photos, cache, TRAINED), images(photos, cache, EVALUATED)
    assert len(entries(cache)) == 8
    assert_same(trained, images(photos, None, TRAINED))
    assert_same(evaluated, images(photos, None, EVALUATED))


def test_grey_images_take_a_third_of_the_room(tmp_path: Path) -> None:
    sizes = []
    for name, shape in (("grey.png", (60, 50)), ("colour.png", (60, 50, 3))):
        picture(tmp_path / name, *shape)
        images(rows_of(tmp_path, [name]), tmp_path / f"cache {name}", TRAINED)
        (entry,) = entries(tmp_path / f"cache {name}")
        sizes.append(entry.stat().st_size)
    assert sizes[1] > 2.8 * sizes[0]


def test_nobody_else_may_look_into_the_folder(tmp_path: Path, photos: list[Row]) -> None:
    images(photos, tmp_path / "a/cache")
    assert (tmp_path / "a/cache").stat().st_mode & 0o777 == 0o700


def test_rows_that_no_check_has_seen_are_decoded(tmp_path: Path, photos: list[Row]) -> None:
    unchecked = [replace(row, checked={}) for row in photos]
    assert_same(images(unchecked, tmp_path / "cache"), images(photos, None))
    assert not (tmp_path / "cache").exists()


# Faults


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "bit flipped": flip,
    "tail zeroed": lambda path: path.write_bytes(path.read_bytes()[:-16] + bytes(16)),
    "hash flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "another entry": lambda path: path.write_bytes(
        next(e for e in path.parents[1].glob("*/*") if e != path).read_bytes()
    ),
}


@pytest.mark.fault(
    "an entry of the image cache empty, cut, bit-flipped, or its tail zeroed", "said, decoded again and replaced"
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, photos: list[Row], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    cache = tmp_path / "cache"
    plain = images(photos, cache)
    whole = [entry.read_bytes() for entry in entries(cache)]
    DAMAGES[damage](entries(cache)[2])
    assert_same(images(photos, cache), plain)
    said = capsys.readouterr().out
    assert said == f"{entries(cache)[2]} in the image cache is damaged; the image is decoded again\n"
    assert [entry.read_bytes() for entry in entries(cache)] == whole


@pytest.mark.fault(
    "an entry of the image cache that is a folder, or may not be read", "decoded every time, same images"
)
@pytest.mark.parametrize("how", ["folder", "unreadable"])
def test_an_entry_that_cannot_be_read(
    tmp_path: Path, photos: list[Row], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    cache = tmp_path / "cache"
    plain = images(photos, cache)
    entry = entries(cache)[0]
    if how == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        read = Path.read_bytes

        def denied(path: Path) -> bytes:
            if path == entry:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", denied)
    assert_same(images(photos, cache), plain)


@pytest.mark.fault("a full disk, or a folder that cannot be made, for the image cache", "said once, it goes on without")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["full", "a file"])
def test_a_cache_that_cannot_be_written(
    tmp_path: Path,
    photos: list[Row],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    workers: int,
    how: str,
) -> None:
    cache = tmp_path / "cache"
    if how == "a file":
        cache.write_text("")
    else:

        def full(path: Path, payload: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(image_cache, "write_atomically", full)
    for train in (TRAINED, EVALUATED):  # as when validation comes after an epoch
        loader: DataLoader = DataLoader(
            dataset(photos, CONFIG, cache, train), collate_fn=collate, num_workers=workers, batch_size=2
        )
        found = [batch.images["oct"][0] for _ in range(2) for batch in loader]
        plain = images(photos, None, train)
        assert_same(found[:2], [plain[0], plain[2]])
    reason = "No space left on device" if how == "full" else "File exists"
    assert capfd.readouterr().out == f"note: nothing more is written to the image cache {cache}: {reason}\n"


def _read_all(folder: Path, cache: Path) -> None:
    torch.set_num_threads(1)  # as loading processes do: a pool of threads does not survive a fork
    rows = rows_of_written(folder)
    assert_same(images(rows, cache, TRAINED), images(rows, None, TRAINED))


def rows_of_written(folder: Path) -> list[Row]:
    return list(read_manifest(folder / "m.csv", CONFIG, classes=("x", "y"), labelled=False).rows)


@pytest.mark.fault("several processes fill one image cache at once", "the same images, whole entries")
@pytest.mark.skipif(os.name != "posix", reason="needs processes that fork")
def test_several_processes_share_a_folder(tmp_path: Path, photos: list[Row]) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_read_all, args=(tmp_path, tmp_path / "cache")) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert [other.exitcode for other in others] == [0] * 4
    assert len(entries(tmp_path / "cache")) == 4
