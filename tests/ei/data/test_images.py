"""Image files as tensors: values against what was written, levels of 16 bits, and every kind of fault."""

import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ei.data.images import MAX_PIXELS, ImageError, check_image, count_slices, read_image
from ei.intensity import Intensity


def assert_equal(image: torch.Tensor, wanted: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(image, wanted, rtol=0, atol=atol)


def noise(*shape: int, dtype: Any = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def expected(pixels: NDArray[Any], white: float) -> torch.Tensor:
    """(H, W) or (H, W, 3) as read_image should give it."""
    colour = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)
    return torch.from_numpy(colour.astype(np.float64) / white).permute(2, 0, 1)[None].float()


def save(pixels: NDArray[Any], path: Path, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bytes(pixels: NDArray[Any], colour_type: int, extra: bytes = b"") -> bytes:
    """A 16-bit PNG, which Pillow cannot write in colour; rows are stored plain and as differences by turns."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    step = rows.shape[1] // width
    differences = rows.copy()
    differences[:, step:] -= rows[:, :-step]
    filtered = [bytes([y % 2]) + (differences if y % 2 else rows)[y].tobytes() for y in range(height)]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(b"".join(filtered)))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def tiff_bytes(
    pixels: NDArray[Any],
    *,
    order: Literal["<", ">"] = "<",
    deflate: bool = False,
    photometric: int = 1,
    planar: bool = False,
) -> bytes:
    """A TIFF of one strip, of kinds that Pillow does not write; planar: one strip for each channel."""
    height, width, *rest = pixels.shape
    channels = rest[0] if rest else 1
    planes = [pixels[..., channel] for channel in range(channels)] if planar else [pixels]
    strips = [plane.astype(pixels.dtype.newbyteorder(order)).tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    bits, kind = pixels.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    offsets, at = [], 8
    for strip in strips:
        offsets.append(at)
        at += len(strip)
    tags: list[tuple[int, list[int]]] = [
        (256, [width]),
        (257, [height]),
        (258, [bits] * channels),
        (259, [8 if deflate else 1]),
        (262, [photometric]),
        (273, offsets),
        (277, [channels]),
        (278, [height]),
        (279, [len(strip) for strip in strips]),
        (284, [2 if planar else 1]),
        (339, [kind] * channels),
    ]
    if channels == 4:
        tags.insert(-1, (338, [2]))
    directory_at = at
    values_at = directory_at + 2 + 12 * len(tags) + 4
    directory, values = struct.pack(order + "H", len(tags)), b""
    for tag, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        directory += struct.pack(order + "HHI", tag, 4, len(numbers))
        directory += packed if len(packed) == 4 else struct.pack(order + "I", values_at + len(values))
        values += packed if len(packed) > 4 else b""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    header = mark + struct.pack(order + "I", directory_at)
    return header + b"".join(strips) + directory + struct.pack(order + "I", 0) + values


# Values


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_8_bits_are_divided_by_255(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    image = read_image(save(pixels, tmp_path / f"image.{suffix}"))
    assert (image.shape, image.dtype) == ((1, 3, 5, 7), torch.float32)
    assert_equal(image, expected(pixels, 255))


def test_a_jpeg_has_the_values_of_its_decoder(tmp_path: Path) -> None:
    path = save(noise(16, 24, 3), tmp_path / "image.jpg", quality=95)
    decoded = np.asarray(Image.open(path))
    assert_equal(read_image(path), expected(decoded, 255))


@pytest.mark.fault("12 bits in 16: {name}", "all 4096 levels are read")
@pytest.mark.parametrize("name", ["a.png", "a.tif", "deflated.tif", "big_endian.tif", "big_endian_deflated.tif"])
def test_all_4096_levels_of_a_12_bit_picture_in_16_bits_survive(tmp_path: Path, name: str) -> None:
    levels = (np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64)
    path = tmp_path / name
    if name in ("a.png", "a.tif"):
        save(levels, path)
    else:
        path.write_bytes(tiff_bytes(levels, order=">" if "big" in name else "<", deflate="deflated" in name))
    image = read_image(path)
    assert len(image[0, 0].unique()) == 4096
    assert_equal(image, expected(levels, 65535), atol=1e-7)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_colour_in_a_tiff_keeps_its_levels(tmp_path: Path, order: Literal["<", ">"], deflate: bool) -> None:
    pixels = noise(9, 11, 3, dtype=np.uint16)
    path = tmp_path / "image.tif"
    path.write_bytes(tiff_bytes(pixels, order=order, deflate=deflate, photometric=2))
    assert_equal(read_image(path), expected(pixels, 65535), atol=1e-7)


@pytest.mark.fault("a PNG in 16-bit colour", "all levels are read")
def test_16_bit_colour_in_a_png_keeps_its_levels(tmp_path: Path) -> None:
    pixels = noise(9, 11, 3, dtype=np.uint16)
    path = tmp_path / "image.png"
    path.write_bytes(png_bytes(pixels, colour_type=2))
    assert_equal(read_image(path), expected(pixels, 65535), atol=1e-7)


def test_16_bit_colour_with_alpha_is_composited_on_black(tmp_path: Path) -> None:
    pixels = noise(9, 11, 4, dtype=np.uint16)
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:].astype(float)
    for name, content in (
        ("image.png", png_bytes(pixels, colour_type=6)),
        ("image.tif", tiff_bytes(pixels, photometric=2)),
    ):
        (tmp_path / name).write_bytes(content)
        visible = expected(colour * alpha / 65535, 65535)
        assert_equal(read_image(tmp_path / name), visible)


def test_zero_may_be_white(tmp_path: Path) -> None:
    for dtype, white in ((np.uint8, 255), (np.uint16, 65535)):
        pixels = noise(5, 7, dtype=dtype)
        path = tmp_path / "image.tif"
        path.write_bytes(tiff_bytes(pixels, photometric=0))
        assert_equal(read_image(path), 1 - expected(pixels, white))


def test_float_tiff_is_taken_as_it_is(tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    assert_equal(read_image(save(pixels, tmp_path / "a.tif")), expected(pixels, 1))


@pytest.mark.fault("a palette", "its colours are read")
def test_palettes_become_their_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8))
    picture.putpalette([255, 0, 0, 0, 128, 0, 10, 20, 30])
    assert picture.mode == "P"
    picture.save(tmp_path / "a.png")
    colours = np.array([[[255, 0, 0], [0, 128, 0]], [[10, 20, 30], [0, 128, 0]]])
    assert_equal(read_image(tmp_path / "a.png"), expected(colours, 255))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    pixels = np.array([[True, False], [False, True]])
    assert_equal(read_image(save(pixels, tmp_path / "a.png")), expected(pixels, 1))


@pytest.mark.fault("CMYK", "its colours are read")
def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    for name in ("a.tif", "a.jpg"):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / name, quality=100)
        red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
        assert_equal(read_image(tmp_path / name), red, atol=0.02)


@pytest.mark.fault("transparency, {mode}", "what was hidden is black")
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_alpha_hides_is_black(tmp_path: Path, mode: str) -> None:
    pixels = noise(6, 7, len(mode))
    pixels[0, :, -1], pixels[1, :, -1] = 0, 255
    Image.fromarray(pixels, mode).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    colour = pixels[..., :-1] if mode == "RGBA" else pixels[..., :1].repeat(3, axis=2)
    visible = colour.astype(float) * pixels[..., -1:] / 255
    assert_equal(image, expected(visible, 255))
    assert not image[0, :, 0].any()


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_transparent_colour_is_black(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(np.array([[200, 100]], dtype=np.uint8))
    if mode == "P":
        picture = Image.new("P", (2, 1))
        picture.putpalette([200] * 3 + [100] * 3)
        picture.putpixel((1, 0), 1)
    transparent: Any = {"L": 200, "RGB": (200, 200, 200), "P": 0}[mode]
    (picture if mode == "P" else picture.convert(mode)).save(tmp_path / "a.png", transparency=transparent)
    pixels = np.array([[0, 100]])
    assert_equal(read_image(tmp_path / "a.png"), expected(pixels, 255))


@pytest.mark.fault("an EXIF orientation", "read upright")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("a.png", np.uint8, {}),
        ("a.png", np.uint16, {}),
        ("a.tif", np.uint8, {}),
        ("a.tif", np.uint16, {}),
        ("a.tif", np.uint16, {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_orientation_is_applied(
    tmp_path: Path, orientation: int, name: str, dtype: Any, options: dict[str, Any]
) -> None:
    pixels = noise(4, 6, dtype=dtype)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(pixels, tmp_path / name, exif=exif, **options)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].T,
        8: np.rot90(pixels),
    }[orientation]
    expected_image = expected(upright, np.iinfo(dtype).max)
    assert_equal(read_image(tmp_path / name), expected_image)


@pytest.mark.fault("a JPEG with a preview", "the photo is read")
def test_the_photo_of_a_multi_picture_jpeg_is_its_first(tmp_path: Path) -> None:
    photo, preview = Image.new("L", (16, 16), 200), Image.new("L", (16, 16), 50)
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert count_slices(tmp_path / "a.jpg") == 1
    assert read_image(tmp_path / "a.jpg").mean().item() == pytest.approx(200 / 255, abs=0.01)


# Arrays and volumes


@pytest.mark.parametrize(
    ("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.dtype(">u2"), 65535), (np.float64, 1)]
)
@pytest.mark.parametrize("fortran", [False, True])
def test_the_axes_of_an_array(tmp_path: Path, dtype: Any, white: float, fortran: bool) -> None:
    def written(pixels: NDArray[Any]) -> torch.Tensor:
        values = pixels / 255 if white == 1 else pixels
        stored = values.astype(dtype)
        np.save(tmp_path / "a.npy", np.asfortranarray(stored) if fortran else stored)
        return read_image(tmp_path / "a.npy")

    grey, colour, volume = noise(5, 6), noise(5, 6, 3), noise(4, 5, 6)
    scale = 255 if white == 1 else white
    assert_equal(written(grey), expected(grey, scale))
    assert_equal(written(colour), expected(colour, scale))
    slices = torch.cat([expected(slice_, scale) for slice_ in volume])
    assert_equal(written(volume), slices)


@pytest.mark.fault("an array (H, W, 3)", "one colour image, not H slices")
def test_a_last_axis_of_three_means_colour(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(9, 5, 3))
    assert read_image(tmp_path / "a.npy").shape == (1, 3, 9, 5)
    assert count_slices(tmp_path / "a.npy") == 1


def volume_file(folder: Path, suffix: str, pixels: NDArray[Any]) -> Path:
    path = folder / f"volume.{suffix}"
    if suffix == "npy":
        np.save(path, pixels)
    else:
        first, *rest = [Image.fromarray(page) for page in pixels]
        first.save(path, save_all=True, append_images=rest)
    return path


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_slices_are_read_in_the_order_asked_for(tmp_path: Path, suffix: str) -> None:
    pixels = noise(5, 6, 7, dtype=np.uint16)
    path = volume_file(tmp_path, suffix, pixels)
    assert count_slices(path) == 5
    chosen = [3, 0, 0, 4]
    image = read_image(path, chosen)
    assert_equal(image, torch.cat([expected(pixels[k], 65535) for k in chosen]))
    assert read_image(path).shape == (5, 3, 6, 7)


def test_the_only_slice_may_be_asked_for_twice(tmp_path: Path) -> None:
    for pixels, colour_type in ((noise(4, 5, dtype=np.uint16), 0), (noise(4, 5, 3, dtype=np.uint16), 2)):
        (tmp_path / "a.png").write_bytes(png_bytes(pixels, colour_type))
        image = read_image(tmp_path / "a.png", [0, 0])
        assert_equal(image, expected(pixels, 65535).expand(2, -1, -1, -1))


@pytest.mark.parametrize("suffix", ["npy", "tif"])
@pytest.mark.parametrize("index", [-1, 5])
def test_a_slice_outside_is_an_error(tmp_path: Path, suffix: str, index: int) -> None:
    path = volume_file(tmp_path, suffix, noise(5, 6, 7))
    with pytest.raises(ImageError, match=rf"slices must be within 0\.\.4, got {index}$"):
        read_image(path, [index])


def test_only_the_slices_asked_for_are_read_from_a_volume(tmp_path: Path) -> None:
    volume = np.full((3, 4, 5), 0.5)
    volume[1] = np.nan
    np.save(tmp_path / "a.npy", volume)
    assert read_image(tmp_path / "a.npy", [0, 2]).eq(0.5).all()
    with pytest.raises(ImageError, match="finite and within"):
        read_image(tmp_path / "a.npy", [1])


# Faults


def truncated(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def saved_bytes(pixels: NDArray[Any], suffix: str, folder: Path, **options: Any) -> bytes:
    return save(pixels, folder / f"whole.{suffix}", **options).read_bytes()


def make_bad_file(kind: str, folder: Path) -> Path:
    """A file that cannot be used, with a name that looks right."""
    path = folder / ("bad.npy" if kind.startswith("npy") else "bad.png")
    pixels = noise(40, 40, 3)
    match kind:
        case "missing":
            pass
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "dangling link":
            path.symlink_to(folder / "nowhere.png")
        case "empty":
            path.touch()
        case "html":
            path.write_text("<!DOCTYPE html><html><body>404</body></html>")
        case "gif":
            Image.fromarray(pixels[..., 0]).save(path, format="GIF")
        case "truncated png":
            truncated(path, saved_bytes(pixels, "png", folder))
        case "truncated jpeg":
            truncated(path, saved_bytes(pixels, "jpg", folder))
        case "truncated tiff":
            truncated(path, saved_bytes(pixels, "tif", folder))
        case "truncated deflated tiff":
            truncated(path, saved_bytes(pixels, "tif", folder, compression="tiff_adobe_deflate"))
        case "damaged deflated tiff":
            content = bytearray(tiff_bytes(pixels, deflate=True, photometric=2))
            content[1000:1100] = bytes(100)
            path.write_bytes(content)
        case "animation":
            frames = [Image.fromarray(noise(8, 8)), Image.new("L", (8, 8))]
            frames[0].save(path, save_all=True, append_images=frames[1:])
        case "pages of two sizes":
            pages = [Image.new("L", (8, 8)), Image.new("L", (8, 9))]
            pages[0].save(path, format="TIFF", save_all=True, append_images=pages[1:])
        case "32-bit integers":
            Image.fromarray(noise(4, 4).astype(np.int32)).save(path, format="TIFF")
        case "signed 16 bits":
            path.write_bytes(tiff_bytes(noise(4, 4).astype(np.int16)))
        case "lab":
            Image.new("LAB", (4, 4)).save(path, format="TIFF")
        case "16-bit grey with alpha":
            path.write_bytes(png_bytes(noise(4, 5, 2, dtype=np.uint16), colour_type=4))
        case "16-bit colour in planes":
            path.write_bytes(tiff_bytes(noise(4, 5, 3, dtype=np.uint16), photometric=2, planar=True))
        case "16-bit grey with a transparent level":
            path.write_bytes(png_bytes(noise(4, 5, dtype=np.uint16), 0, extra=png_chunk(b"tRNS", bytes(2))))
        case "16-bit colour with a transparent level":
            path.write_bytes(png_bytes(noise(4, 5, 3, dtype=np.uint16), 2, extra=png_chunk(b"tRNS", bytes(6))))
        case "float tiff above one":
            Image.fromarray(np.full((4, 4), 1.5, np.float32)).save(path, format="TIFF")
        case "npy truncated":
            np.save(folder / "whole.npy", pixels)
            truncated(path, (folder / "whole.npy").read_bytes())
        case "npy followed by another":
            with path.open("wb") as file:
                np.save(file, pixels)
                np.save(file, pixels)
        case "npy of 4 TiB":
            np.save(path, np.zeros((2, 2), np.uint8))
            path.write_bytes(path.read_bytes().replace(b"(2, 2)", b"(2097152, 2097152)", 1))
        case "npy overflowing":
            np.save(path, np.zeros((2, 2), np.uint8))
            shape = b"(4294967296, 4294967296)"
            path.write_bytes(path.read_bytes().replace(b"(2, 2), }" + b" " * 18, shape + b", }", 1))
        case "npy of objects":
            np.save(path, np.array([[object()]]), allow_pickle=True)
        case "npy that is a pickle":
            path.write_bytes(b"\x80\x04K\x01.")
        case "npy that is an npz":
            np.savez(folder / "a.npz", pixels)
            (folder / "a.npz").rename(path)
        case "npy with NaN":
            np.save(path, np.array([[0.5, np.nan]]))
        case "npy with infinity":
            np.save(path, np.array([[0.5, np.inf]]))
        case "npy above one":
            np.save(path, np.array([[0.5, 1.01]]))
        case "npy below zero":
            np.save(path, np.array([[0.5, -0.01]]))
        case "npy signed":
            np.save(path, noise(4, 4).astype(np.int16))
        case "npy uint32":
            np.save(path, noise(4, 4).astype(np.uint32))
        case "npy complex":
            np.save(path, noise(4, 4).astype(np.complex64))
        case "npy one axis":
            np.save(path, noise(4))
        case "npy four axes":
            np.save(path, noise(2, 4, 4, 3))
        case "npy trailing one":
            np.save(path, noise(40, 40, 1))
        case "npy alpha":
            np.save(path, noise(40, 40, 4))
        case "npy no slices":
            np.save(path, noise(0, 40, 40))
        case "npy no pixels":
            np.save(path, noise(5, 0, 40))
        case _:
            raise AssertionError(kind)
    return path


FAULTS = {
    "missing": "does not exist",
    "directory": "is a directory",
    "fifo": "not a regular file",
    "dangling link": "link to a file that does not exist",
    "empty": "is empty",
    "html": "not a PNG, JPEG or TIFF",
    "gif": "not a PNG, JPEG or TIFF",
    "truncated png": "(?i)truncated",
    "truncated jpeg": "truncated",
    "truncated tiff": "truncated",
    "truncated deflated tiff": "read",
    "damaged deflated tiff": "cannot be read",
    "animation": "is an animation",
    "pages of two sizes": "pages of different shapes",
    "32-bit integers": "more than 8 bits",
    "signed 16 bits": "more than 8 bits",
    "lab": "mode 'LAB'",
    "16-bit grey with alpha": "more than 8 bits",
    "16-bit colour in planes": "more than 8 bits",
    "16-bit grey with a transparent level": "more than 8 bits",
    "16-bit colour with a transparent level": "more than 8 bits",
    "float tiff above one": r"from 1\.5 to 1\.5; they must be finite and within 0\.\.1",
    "npy truncated": "has 2464 bytes, but its header .* promises 4928",
    "npy followed by another": "has 9856 bytes, but its header .* promises 4928",
    "npy of 4 TiB": "promises 4398046511",
    "npy overflowing": "promises 184467440737",
    "npy of objects": "Python objects, which are never loaded",
    "npy that is a pickle": "magic",
    "npy that is an npz": "magic",
    "npy with NaN": "from nan to nan",
    "npy with infinity": "to inf",
    "npy above one": r"to 1\.01; they must be finite and within 0\.\.1, unless --intensity is LOW:HIGH or percentiles$",
    "npy below zero": r"from -0\.01",
    "npy signed": "holds int16, and neither this type nor",
    "npy uint32": "holds uint32, and neither",
    "npy complex": "holds complex64",
    "npy one axis": r"has shape \(4,\)",
    "npy four axes": r"has shape \(2, 4, 4, 3\)",
    "npy trailing one": r"has shape \(40, 40, 1\)",
    "npy alpha": r"has shape \(40, 40, 4\)",
    "npy no slices": r"is empty: shape \(0, 40, 40\)",
    "npy no pixels": "is empty: 0 x 40 pixels",
}


@pytest.mark.fault("an image file: {kind}", "refused, file and reason named")
# Warnings are no errors here, so that it is not they that make a damaged file an error.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", [read_image, check_image])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_file_is_named_with_the_reason(tmp_path: Path, kind: str, reader: Any) -> None:
    path = make_bad_file(kind, tmp_path)
    with pytest.raises(ImageError, match=FAULTS[kind]) as error:
        reader(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("a.png", ""), ("a.JPG", "")]
    + [
        (f"a{suffix}", "; other files are read by names that end in .npy, .nii, .nii.gz or .dcm")
        for suffix in (".npz", "")
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_bytes(b"RIFF....WEBP" * 30)
    with pytest.raises(ImageError) as error:
        read_image(tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}: is not a PNG, JPEG or TIFF that can be read{hint}"


def test_every_kind_of_good_file_passes_the_check(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "tif"):
        check_image(save(noise(9, 9, 3), tmp_path / f"a.{suffix}"))
    for pixels in (noise(9, 9), np.linspace(0, 1, 6).reshape(2, 3)):
        np.save(tmp_path / "a.npy", pixels)
        check_image(tmp_path / "a.npy")


@pytest.mark.fault("a .{suffix} cut at any length", "refused, or the whole image")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "npy"])
def test_no_shortened_file_is_read(tmp_path: Path, suffix: str) -> None:
    pixels = noise(6, 6, 3)
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, pixels)
    else:
        save(pixels, path)
    content = path.read_bytes()
    whole = read_image(path)
    for length in {*range(0, len(content), 11), *range(len(content) - 30, len(content))}:
        path.write_bytes(content[:length])
        # Bytes after the last pixel, such as the end mark of a PNG, may be missing.
        try:
            image = read_image(path)
        except ImageError:
            continue
        assert torch.equal(image, whole), f"{length} of {len(content)} bytes gave another image"


@pytest.mark.fault("a byte of a PNG changed", "refused by the check")
def test_a_changed_byte_of_a_png_is_found(tmp_path: Path) -> None:
    content = bytearray(saved_bytes(noise(12, 12, 3), "png", tmp_path))
    content[-14] ^= 1  # in the checksum of the last chunk of pixels, which decoding does not look at
    path = tmp_path / "changed.png"
    path.write_bytes(content)
    assert read_image(path).shape == (1, 3, 12, 12)
    with pytest.raises(ImageError, match="checksum|CRC"):
        check_image(path)


@pytest.mark.fault("a PNG of 30 kB with 144 million pixels", "refused before it is decoded")
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_small_file_with_very_many_pixels_is_refused(tmp_path: Path, action: Literal["ignore", "error"]) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    assert path.stat().st_size < 30_000
    assert MAX_PIXELS < 12_000**2
    with warnings.catch_warnings(), pytest.raises(ImageError, match=f"at most {MAX_PIXELS} are read"):
        warnings.simplefilter(action)
        read_image(path)


@pytest.mark.fault("an array with too many pixels", "refused")
def test_the_limit_holds_for_arrays_and_where_pillow_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ei.data.formats.source.MAX_PIXELS", 99)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    np.save(tmp_path / "a.npy", noise(2, 10, 10))
    np.save(tmp_path / "small.npy", noise(2, 9, 11))
    for path in (tmp_path / "a.npy", save(noise(10, 10), tmp_path / "a.png")):
        with pytest.raises(ImageError, match="10 x 10 pixels; at most 99 are read"):
            check_image(path)
    check_image(tmp_path / "small.npy")


# Black and white by the setting


@pytest.mark.parametrize("kind", ["a.npy int16", "a.npy float32", "a.npy uint16", "a.png uint16", "a.tif float32"])
def test_a_window_is_straight_and_cut_off(tmp_path: Path, kind: str) -> None:
    name, dtype = kind.split()
    pixels = np.array([[0, 100, 150], [200, 300, 4000]]).astype(dtype)
    if name.endswith(".npy"):
        np.save(tmp_path / name, pixels)
    else:
        save(pixels, tmp_path / name)
    check_image(tmp_path / name, intensity=Intensity("window", 100, 300))
    image = read_image(tmp_path / name, intensity=Intensity("window", 100, 300))
    assert_equal(image, expected(np.array([[0, 0, 0.25], [0.5, 1, 1]]), 1))


def test_percentiles_are_those_of_the_whole_file_whatever_slices_are_read(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(-500, 300, (6, 20, 20)).astype(np.float32)
    np.save(tmp_path / "a.npy", volume)
    low, high = np.percentile(volume, (0.5, 99.5))
    image = read_image(tmp_path / "a.npy", [4, 1], intensity=Intensity("percentiles"))
    wanted = np.clip((volume[[4, 1]] - low) / (high - low), 0, 1)
    assert_equal(image[:, 0], torch.from_numpy(wanted).float())
    np.save(tmp_path / "a.npy", volume * 7 + 3)
    os.utime(tmp_path / "a.npy", ns=(0, 0))  # so that it is another file, however coarse the clock
    assert_equal(read_image(tmp_path / "a.npy", [4, 1], intensity=Intensity("percentiles"))[:, 0], image[:, 0], 1e-5)


def test_8_bits_are_divided_by_255_under_every_setting(tmp_path: Path) -> None:
    pixels = noise(5, 7, 3) // 2
    path = save(pixels, tmp_path / "a.png")
    for intensity in (Intensity("window", 0, 4095), Intensity("percentiles")):
        assert_equal(read_image(path, intensity=intensity), expected(pixels, 255))


@pytest.mark.fault("a constant volume", "black")
def test_a_constant_volume_is_black_under_percentiles(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((3, 5, 5), -7, np.int16))
    assert not read_image(tmp_path / "a.npy", intensity=Intensity("percentiles")).any()


@pytest.mark.fault("{value} in pixels", "refused, whatever the intensity")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("intensity", [Intensity("window", 0, 1), Intensity("percentiles")])
def test_no_setting_lets_numbers_in_that_are_not_finite(tmp_path: Path, value: float, intensity: Intensity) -> None:
    pixels = np.zeros((30, 30))
    pixels[3, 4] = value
    np.save(tmp_path / "a.npy", pixels)
    for reader in (read_image, check_image):
        with pytest.raises(ImageError, match="not finite"):
            reader(tmp_path / "a.npy", intensity=intensity)


@pytest.mark.fault("{package} is not installed", "said in one sentence")
@pytest.mark.parametrize(("name", "package"), [("a.nii", "nibabel"), ("a.dcm", "pydicom")])
def test_a_missing_extra_is_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).write_bytes(bytes(400))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f'needs {package}, .*: pip install "mixture-of-ranks\\[io\\]"$'):
        check_image(tmp_path / name)


def test_backslashes_get_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="write '/' between folders"):
        check_image(tmp_path / "images\\a.png")


def test_checking_files_needs_no_torch() -> None:
    code = "import sys, ei.data, ei.data.images; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
