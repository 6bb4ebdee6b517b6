"""What is learned about image files, when they are read again, and what a damaged memory does: nothing."""

import hashlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ei.data.audit import ALIKE, AuditCache, Facts, audit_image, likeness
from ei.data.images import ImageError
from ei.intensity import BY_TYPE, Intensity


def scene(seed: int, size: int = 96) -> NDArray[np.uint8]:
    """Soft spots, different for every seed."""
    spots = np.random.default_rng(seed).random((6, 6)).astype(np.float32) * 255
    soft = Image.fromarray(spots).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(soft).clip(0, 255).astype(np.uint8)


def save(pixels: NDArray[Any], path: Path, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def fingerprint(path: Path) -> str:
    return audit_image(path, BY_TYPE).fingerprint


# Facts


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    path = save(scene(0), tmp_path / "a.png")
    assert audit_image(path, BY_TYPE).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_copies_look_alike_and_others_do_not(tmp_path: Path) -> None:
    original = [fingerprint(save(scene(seed), tmp_path / "a.png")) for seed in range(8)]
    resized = [fingerprint(save(scene(seed, 70), tmp_path / "a.png")) for seed in range(8)]
    compressed = [fingerprint(save(scene(seed), tmp_path / "a.jpg", quality=60)) for seed in range(8)]
    deeper = [fingerprint(save(scene(seed).astype(np.uint16) * 200, tmp_path / "a.png")) for seed in range(8)]
    for copies in (resized, compressed, deeper):
        alike = likeness(original, copies) >= ALIKE
        np.testing.assert_array_equal(alike, np.eye(8, dtype=bool))


def test_a_volume_is_known_by_its_middle(tmp_path: Path) -> None:
    volume = np.stack([scene(seed) for seed in (1, 2, 3)])
    np.save(tmp_path / "a.npy", volume)
    assert fingerprint(tmp_path / "a.npy") == fingerprint(save(scene(2), tmp_path / "a.png"))


@pytest.mark.parametrize("pixels", [scene(0, 31), np.full((64, 64), 7, np.uint8), np.zeros((64, 64), np.uint8)])
def test_small_and_flat_images_have_no_fingerprint(tmp_path: Path, pixels: NDArray[Any]) -> None:
    assert fingerprint(save(pixels, tmp_path / "a.png")) == ""


def test_the_brightest_number_is_that_of_16_bits_by_type(tmp_path: Path) -> None:
    volume = np.zeros((3, 5, 5), np.uint16)
    volume[2, 3, 4] = 4001
    np.save(tmp_path / "a.npy", volume)
    assert audit_image(tmp_path / "a.npy", BY_TYPE).brightest == 4001
    assert audit_image(tmp_path / "a.npy", Intensity("window", 0, 4095)).brightest == 0
    assert audit_image(save(scene(0), tmp_path / "a.png"), BY_TYPE).brightest == 0


def test_what_an_image_looks_like(tmp_path: Path) -> None:
    colour = np.zeros((40, 60, 3), np.uint8)
    colour[:20] = (255, 0, 51)
    rows = (np.arange(300)[:, None] < 150) * np.ones((1, 200))
    cases = [
        (colour, (40, 60, 1, 0.5, 0.2, 0.2)),
        (colour[..., 0], (40, 60, 1, 0, 0.5, 0.5)),
        ((rows * 255).astype(np.uint8), (300, 200, 1, 0, 0.5, 0.5)),  # of which not every pixel is looked at
    ]
    for pixels, (height, width, slices, *impression) in cases:
        found = audit_image(save(pixels, tmp_path / "a.png"), BY_TYPE).appearance
        assert found[:3] == (height, width, slices)
        np.testing.assert_allclose(found[3:], impression, atol=1e-3)
    np.save(tmp_path / "a.npy", np.stack([np.full((5, 6), level, np.uint8) for level in (0, 102, 255)]))
    assert audit_image(tmp_path / "a.npy", BY_TYPE).appearance == (5, 6, 3, 0, 0.4, 0)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(scene(0), tmp_path / "a.png")

    def changed(pixels: NDArray[Any]) -> str:
        save(scene(1), path)
        return ""

    monkeypatch.setattr("ei.data.audit._fingerprint", changed)
    with pytest.raises(ImageError, match=r"a\.png: was changed while it was read"):
        audit_image(path, BY_TYPE)


# Memory


class Auditor:
    """Counts what is read."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, path: Path, intensity: Intensity) -> Facts:
        self.count += 1
        return audit_image(path, intensity)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Old enough that its times tell whether it has changed."""
    return aged(save(scene(0), tmp_path / "a.png"))


def aged(path: Path) -> Path:
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def remembered(folder: Path, path: Path, intensity: Intensity = BY_TYPE) -> tuple[Facts, int]:
    """The facts, and how often the file was read for them by a new process, as it were."""
    auditor = Auditor()
    cache = AuditCache(folder, home=folder / "home")
    facts = cache.facts(path, intensity, auditor)
    cache.save()
    return facts, auditor.count


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, image: Path) -> None:
    facts, count = remembered(tmp_path, image)
    assert count == 1
    assert remembered(tmp_path, image) == (facts, 0)
    image.write_bytes(image.read_bytes() + b"\0")
    aged(image)
    assert remembered(tmp_path, image)[1] == 1


def test_another_content_of_the_same_size_and_time_is_noticed(tmp_path: Path, image: Path) -> None:
    """The time of the inode cannot be set back, so a copied time of the content hides nothing."""
    remembered(tmp_path, image)
    content = bytearray(image.read_bytes())
    content[60] ^= 1
    replacement = tmp_path / "new"
    replacement.write_bytes(content)
    wait_for_the_clock(image, tmp_path)
    os.replace(aged(replacement), image)
    with pytest.raises(ImageError):
        remembered(tmp_path, image)


def wait_for_the_clock(path: Path, folder: Path) -> None:
    while True:
        (folder / "tick").write_text("")
        if (folder / "tick").stat().st_ctime_ns > path.stat().st_ctime_ns:
            return


def test_the_rule_for_black_and_white_is_part_of_the_question(tmp_path: Path, image: Path) -> None:
    remembered(tmp_path, image)
    assert remembered(tmp_path, image, Intensity("window", 0, 10))[1] == 1
    assert remembered(tmp_path, image)[1] == 0


def test_a_fault_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("<html>")
    aged(path)
    for _ in range(2):
        with pytest.raises(ImageError, match="is not a PNG"):
            remembered(tmp_path, path)


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = save(scene(0), tmp_path / "a.png")
    assert [remembered(tmp_path, path)[1] for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("damage", ["truncated", "edited", "empty", "binary", "directory"])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, image: Path, damage: str) -> None:
    facts, _ = remembered(tmp_path, image)
    (file,) = (tmp_path / "home").rglob("audit-*.json")
    content = file.read_text()
    match damage:
        case "truncated":
            file.write_text(content[:-20])
        case "edited":
            file.write_text(content.replace(facts.sha256, "0" * 64))
        case "empty":
            file.write_text("")
        case "binary":
            file.write_bytes(b"\xff\xfe\0")
        case "directory":
            file.unlink()
            file.mkdir()
    assert remembered(tmp_path, image) == (facts, 1)


def test_what_another_version_found_is_forgotten(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered(tmp_path, image)
    monkeypatch.setattr("ei.data.audit._VERSION", "2")
    assert remembered(tmp_path, image)[1] == 1


def test_what_a_version_with_fewer_facts_found_is_forgotten(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [field for field in fields(Facts) if field.name != "appearance"]
    with monkeypatch.context() as patched:
        patched.setattr("ei.data.audit.fields", lambda kind: known)
        patched.setattr(
            "ei.data.audit.asdict", lambda facts: {field.name: getattr(facts, field.name) for field in known}
        )
        remembered(tmp_path, image)
    assert remembered(tmp_path, image)[1] == 1


def test_only_the_owner_may_read_it_and_nothing_else_is_left(tmp_path: Path, image: Path) -> None:
    remembered(tmp_path, image)
    (file,) = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert file.stat().st_mode & 0o777 == 0o600


def test_where_nothing_can_be_written_files_are_read_each_time(tmp_path: Path, image: Path) -> None:
    (tmp_path / "home").write_text("a file, no folder")
    assert [remembered(tmp_path, image)[1] for _ in range(2)] == [1, 1]


def test_a_user_without_a_home_has_no_memory(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    cache = AuditCache(tmp_path)
    assert cache.facts(image, BY_TYPE, audit_image) == audit_image(image, BY_TYPE)
    cache.save()
