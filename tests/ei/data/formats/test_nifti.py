"""NIfTI: how slices lie, what numbers mean, and files that promise what they do not hold."""

import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ei.data.formats import nifti
from ei.data.images import ImageError, check_image, count_slices, read_image
from ei.intensity import Intensity

nibabel = pytest.importorskip("nibabel")

SUFFIXES = [".nii", ".nii.gz"]


def noise(*shape: int, dtype: Any = np.uint8) -> NDArray[Any]:
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(limits.min, limits.max + 1, shape).astype(dtype)


def save(values: NDArray[Any], path: Path, affine: NDArray[Any] | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1, -1, 1, 1]) if affine is None else affine), path)
    return path


def slices_of(path: Path, **options: Any) -> NDArray[Any]:
    """(S, H, W), after a look that the three channels are one."""
    image = read_image(path, **options)
    assert torch.equal(image[:, 0], image[:, 1])
    assert torch.equal(image[:, 0], image[:, 2])
    return image[:, 0].numpy()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.dtype(">u2"), 65535)])
def test_the_third_axis_counts_slices(tmp_path: Path, suffix: str, dtype: Any, white: float) -> None:
    values = noise(5, 6, 4, dtype=dtype)
    path = save(values, tmp_path / f"a{suffix}")
    assert count_slices(path) == 4
    wanted = values.transpose(2, 1, 0) / white
    np.testing.assert_allclose(slices_of(path), wanted, atol=1e-7)
    np.testing.assert_allclose(slices_of(path, slices=[3, 0, 0]), wanted[[3, 0, 0]], atol=1e-7)
    check_image(path)


@pytest.mark.fault("NIfTI axes in any order and direction", "the same slices")
@pytest.mark.parametrize("sliced", range(3))
@pytest.mark.parametrize("stored", [*itertools.product((-1, 1), repeat=3)])
@pytest.mark.parametrize("swapped", [False, True])
def test_every_way_to_store_a_head_gives_the_same_slices(
    tmp_path: Path, sliced: int, stored: tuple[int, ...], swapped: bool
) -> None:
    """The head is (right, front, up) here; its slices lie as the module says, in all 48 ways to store it."""
    head = noise(5, 6, 7)
    across, down = sorted({0, 1, 2} - {sliced})
    order = (down, across, sliced) if swapped else (across, down, sliced)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    values = head.transpose(order)
    for axis, anatomical in enumerate(order):
        affine[anatomical, axis] = stored[axis]
        if stored[axis] < 0:
            values = np.flip(values, axis)
    wanted = np.flip(head.transpose(sliced, down, across), (1, 2))
    np.testing.assert_allclose(slices_of(save(values, tmp_path / "a.nii", affine)), wanted / 255, atol=1e-7)


def test_the_scale_of_the_file_is_applied(tmp_path: Path) -> None:
    stored = noise(5, 6, 2, dtype=np.int16)
    image = nibabel.Nifti1Image(stored, np.diag([-1, -1, 1, 1]))
    image.header.set_slope_inter(0.5, 100)
    # nibabel forgets the scale of arrays that it was given, so it goes into the file.
    path = tmp_path / "a.nii"
    nibabel.save(image, path)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([0.5, 100], "<f4").tobytes()
    path.write_bytes(content)
    scaled = stored.transpose(2, 1, 0) * 0.5 + 100
    np.testing.assert_allclose(nibabel.load(path).get_fdata().transpose(2, 1, 0), scaled)
    wanted = np.clip((scaled + 1000) / 3000, 0, 1)
    np.testing.assert_allclose(slices_of(path, intensity=Intensity("window", -1000, 2000)), wanted, atol=1e-6)
    with pytest.raises(ImageError, match="has float values from"):
        read_image(path)


def test_a_plane_is_one_slice_and_axes_of_one_are_dropped(tmp_path: Path) -> None:
    assert read_image(save(noise(5, 6), tmp_path / "plane.nii")).shape == (1, 3, 6, 5)
    assert read_image(save(noise(5, 6, 4, 1), tmp_path / "volume.nii")).shape == (4, 3, 6, 5)


def complex_values() -> NDArray[Any]:
    return noise(4, 4, 4).astype(np.complex64)


@pytest.mark.fault("NIfTI of other numbers or axes, or with NaN", "refused by name")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (noise(4, 4, 4, dtype=np.int16), "holds int16, and neither this type nor a window"),
        (noise(4, 4, 4).astype(np.float32), "has float values from"),
        (np.full((4, 4, 4), np.nan, np.float32), "from nan to nan"),
        (complex_values(), "holds complex64"),
        (noise(4, 4, 4, 2), r"has shape \(4, 4, 4, 2\); volumes of three axes"),
        (noise(4), "has shape"),
        (noise(4, 4, 4).astype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "integers and floats"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_refused(tmp_path: Path, values: NDArray[Any], message: str, suffix: str) -> None:
    path = save(values, tmp_path / f"a{suffix}")
    for reader in (read_image, check_image):
        with pytest.raises(ImageError, match=message):
            reader(path)


@pytest.mark.fault("a NaN voxel in NIfTI", "refused, whatever the intensity")
@pytest.mark.parametrize("rule", [Intensity("window", 0, 1), Intensity("percentiles")])
def test_numbers_that_are_not_finite_are_refused_under_every_rule(tmp_path: Path, rule: Intensity) -> None:
    values = noise(4, 4, 4).astype(np.float32)
    values[1, 2, 3] = np.nan
    with pytest.raises(ImageError, match="not finite"):
        check_image(save(values, tmp_path / "a.nii"), intensity=rule)


@pytest.mark.fault("a {suffix} cut", "refused by name")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("length", [0, 100, 400, -100])
def test_truncated(tmp_path: Path, suffix: str, length: int) -> None:
    path = save(noise(16, 16, 16), tmp_path / f"a{suffix}")
    path.write_bytes(path.read_bytes()[:length])
    for reader in (read_image, check_image):
        with pytest.raises(ImageError):
            reader(path)


def promising(path: Path, *, shape: tuple[int, ...]) -> Path:
    """A small file whose header says that it is large."""
    plain = save(noise(4, 4, 4), path.with_name("plain.nii"))
    content = bytearray(plain.read_bytes())
    content[42 : 42 + 2 * len(shape)] = np.array(shape, "<i2").tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.fault("a {suffix} whose header promises gigabytes", "refused before anything is allocated")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_header_that_promises_too_much_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = promising(tmp_path / f"a{suffix}", shape=(9000, 9000, 20))
    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "get_unscaled", lambda proxy: pytest.fail("allocates"))
    with pytest.raises(ImageError, match="but its header promises 1620000352"):
        read_image(path)
    monkeypatch.setattr(nifti, "_MAX_UNPACKED", 10_000)
    if suffix == ".nii.gz":
        with pytest.raises(ImageError, match="unpacks to 1620000352 bytes, at most 10000 are"):
            read_image(path)


@pytest.mark.fault("a byte of a .nii.gz changed", "refused by the check")
def test_a_changed_byte_of_a_compressed_file_is_found(tmp_path: Path) -> None:
    path = save(noise(16, 16, 16), tmp_path / "a.nii.gz")
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the checksum
    path.write_bytes(content)
    with pytest.raises(ImageError, match="CRC"):
        check_image(path)
