"""DICOM: the order of its transformations, frames, colour, and what is refused. pydicom's files are the corpus."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ei.data.images import ImageError, check_image, count_slices, read_image
from ei.intensity import Intensity

pydicom = pytest.importorskip("pydicom")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid  # noqa: E402


def picture(stored: NDArray[Any], photometric: str = "MONOCHROME2", bits: int = 0, **attributes: Any) -> Dataset:
    """(H, W), (F, H, W) or (H, W, 3) as a data set of so many stored bits."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
    is_colour = photometric == "RGB"
    header.SamplesPerPixel = 3 if is_colour else 1
    if is_colour:
        header.PlanarConfiguration = 0
    header.PhotometricInterpretation = photometric
    if stored.ndim == 3 and not is_colour:
        header.NumberOfFrames = len(stored)
    header.Rows, header.Columns = stored.shape[:2] if is_colour else stored.shape[-2:]
    header.BitsAllocated = stored.dtype.itemsize * 8
    header.BitsStored = bits or header.BitsAllocated
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    content = stored.tobytes()
    header.add_new("PixelData", "OB" if stored.dtype.itemsize == 1 else "OW", content + b"\0" * (len(content) % 2))
    for name, value in attributes.items():
        setattr(header, name, value)
    return header


def save(header: Dataset, folder: Path) -> Path:
    header.save_as(folder / "a.dcm", enforce_file_format=True)
    return folder / "a.dcm"


def grey(path: Path, **options: Any) -> NDArray[Any]:
    return read_image(path, **options)[:, 0].numpy()


def noise(*shape: int, high: int = 4096, low: int = 0, dtype: Any = np.uint16) -> NDArray[Any]:
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


def test_bits_stored_are_the_scale_not_bits_allocated(tmp_path: Path) -> None:
    stored = noise(5, 7)
    stored[0, 0] = 4095
    path = save(picture(stored, bits=12), tmp_path)
    np.testing.assert_allclose(grey(path)[0], stored / 4095, atol=1e-6)
    assert grey(path).max() == 1


def test_bits_above_bits_stored_are_no_part_of_the_picture(tmp_path: Path) -> None:
    stored = noise(5, 7)
    plain = grey(save(picture(stored, bits=12), tmp_path))
    with_overlay = grey(save(picture(stored | 0x8000, bits=12), tmp_path))
    np.testing.assert_array_equal(with_overlay, plain)


def test_a_decoder_that_gives_more_bits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(picture(noise(5, 7), bits=12), tmp_path)
    monkeypatch.setattr("pydicom.pixels.pixel_array", lambda path, index: np.full((5, 7), 4096, np.uint16))
    with pytest.raises(ImageError, match="has the number 4096, but 12 bits are stored"):
        check_image(path)


def test_a_rescale_without_window_changes_nothing(tmp_path: Path) -> None:
    stored = noise(5, 7)
    plain = grey(save(picture(stored, bits=12), tmp_path))
    rescaled = grey(save(picture(stored, bits=12, RescaleSlope=0.5, RescaleIntercept=-300), tmp_path))
    np.testing.assert_allclose(rescaled, plain, atol=1e-6)


@pytest.mark.fault("DICOM: rescale, window, MONOCHROME1", "applied in order, inverted once")
@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_rescale_then_window_then_one_inversion(
    tmp_path: Path, function: str | None, dtype: Any, photometric: str
) -> None:
    stored = noise(15, 17, dtype=dtype)
    attributes = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": [1040, 60], "WindowWidth": [400, 80]}
    if function:
        attributes["VOILUTFunction"] = function
    header = picture(stored, photometric, **attributes)
    windowed = apply_voi_lut(apply_modality_lut(stored, header), header)
    highest = (32767 if dtype is np.int16 else 65535) * 2 - 1024
    lowest = (-32768 if dtype is np.int16 else 0) * 2 - 1024
    wanted = (windowed - lowest) / (highest - lowest)
    assert 0 < np.mean((wanted > 0.01) & (wanted < 0.99)) < 1
    image = grey(save(header, tmp_path))[0]
    np.testing.assert_allclose(image, 1 - wanted if photometric == "MONOCHROME1" else wanted, atol=1e-6)


def test_a_window_of_one_is_a_threshold(tmp_path: Path) -> None:
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3)
    image = grey(save(picture(stored, WindowCenter=3, WindowWidth=1), tmp_path))[0]
    np.testing.assert_array_equal(image, [[0, 0, 0], [1, 1, 1]])


def table(first: int, entries: list[int], bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return item


def test_tables_go_before_windows(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 2, 3]], np.uint8)
    voi = table(10, [0, 200, 100, 255], 8)
    voi.LUTExplanation = "made up"
    modality = table(0, [10, 11, 12, 13], 8)
    modality.ModalityLUTType = "US"
    header = picture(stored, ModalityLUTSequence=[modality], VOILUTSequence=[voi], WindowCenter=1, WindowWidth=2)
    np.testing.assert_allclose(grey(save(header, tmp_path))[0], np.array([[0, 200, 100, 255]]) / 255, atol=1e-6)


@pytest.mark.fault("DICOM of several frames", "a volume; each frame by its own window")
def test_frames_are_slices_and_have_their_own_groups(tmp_path: Path) -> None:
    stored = noise(3, 4, 5, dtype=np.int16)
    frames = []
    for number in range(3):
        rescale, window, frame = Dataset(), Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = number + 1, -100, "US"
        window.WindowCenter, window.WindowWidth = 1000, 900
        window.VOILUTFunction = "LINEAR_EXACT"
        frame.PixelValueTransformationSequence = [rescale]
        frame.FrameVOILUTSequence = [window]
        frames.append(frame)
    shared = Dataset()
    shared.FrameVOILUTSequence = frames[1].FrameVOILUTSequence
    del frames[1].FrameVOILUTSequence
    header = picture(stored, PerFrameFunctionalGroupsSequence=frames, SharedFunctionalGroupsSequence=[shared])
    path = save(header, tmp_path)
    assert count_slices(path) == 3
    slopes = np.array([1, 2, 3])[:, None, None]
    wanted = np.clip((stored * slopes - 100 - 1000) / 900 + 0.5, 0, 1)
    np.testing.assert_allclose(grey(path), wanted, atol=1e-6)
    np.testing.assert_allclose(grey(path, slices=[2, 0]), wanted[[2, 0]], atol=1e-6)


def test_the_setting_replaces_the_window_but_not_the_rescale_nor_the_inversion(tmp_path: Path) -> None:
    stored = noise(6, 7, dtype=np.int16)
    header = picture(stored, "MONOCHROME1", RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=80)
    wanted = 1 - np.clip((stored - 1024.0 + 160) / 400, 0, 1)
    np.testing.assert_allclose(
        grey(save(header, tmp_path), intensity=Intensity("window", -160, 240))[0], wanted, atol=1e-6
    )


def test_signed_numbers_without_a_window_need_the_setting(tmp_path: Path) -> None:
    path = Path(str(get_testdata_file("CT_small.dcm")))
    with pytest.raises(ImageError, match="nor a window in the file says which number is black"):
        check_image(path)
    image = grey(path, intensity=Intensity("percentiles"))
    assert (image.min(), image.max()) == (0, 1)


def test_colour(tmp_path: Path) -> None:
    stored = noise(5, 6, 3, high=256, dtype=np.uint8)
    image = read_image(save(picture(stored, "RGB"), tmp_path))
    np.testing.assert_allclose(image[0].permute(1, 2, 0), stored / 255, atol=1e-6)


@pytest.mark.fault("DICOM in colour: {name}", "the same colours")
@pytest.mark.parametrize("name", ["SC_ybr_full_422_uncompressed.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_rle.dcm"])
def test_ybr_and_rgb_files_show_the_same_bars(name: str) -> None:
    """All are the same picture of coloured bars, red on top."""
    image = read_image(str(get_testdata_file(name)))[0]
    assert image.shape == (3, 100, 100)
    np.testing.assert_allclose(image[:, 3, 50], [1, 0, 0], atol=0.02)


def test_a_palette_becomes_its_colours() -> None:
    path = str(get_testdata_file("examples_palette.dcm"))
    image = read_image(path)
    assert image.shape[:2] == (1, 3)
    assert not np.array_equal(image[0, 0], image[0, 1])


@pytest.mark.fault("DICOM: {name}", "refused, file and reason named")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MR_truncated.dcm", "cannot be read"),
        ("no_meta.dcm", "is not a DICOM file"),
        ("rtplan.dcm", "is DICOM without a picture"),
        ("image_dfl.dcm", "no pixel data"),
        ("JPEGLSNearLossless_16.dcm", "is compressed .JPEG-LS.*no decoder that is installed"),
        ("rtdose_1frame.dcm", "holds uint32"),
    ],
)
# pydicom warns of what is not quite as the standard wants it; errors here must be ours.
@pytest.mark.filterwarnings("ignore")
def test_files_that_cannot_be_used_are_named_with_the_reason(name: str, message: str) -> None:
    path = str(get_testdata_file(name))
    for reader in (read_image, check_image):
        with pytest.raises(ImageError, match=message) as error:
            reader(path)
        assert str(error.value).startswith(path)
        assert "\n" not in str(error.value)


@pytest.mark.fault("DICOM with a header that does not fit its pixels", "refused by name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NumberOfFrames": 100}, "cannot be read"),
        ({"PhotometricInterpretation": "CMYK"}, "photometric interpretation CMYK"),
        ({"WindowCenter": 5, "WindowWidth": 0}, "window of width 0"),
        ({"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "window of the kind CUBIC"),
        ({"Rows": 60000, "Columns": 60000}, "has 60000 x 60000 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_headers_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    stored = np.full((4, 6), 4095, np.uint16)
    with pytest.raises(ImageError, match=message):
        check_image(save(picture(stored, **change), tmp_path))


@pytest.mark.fault("DICOM cut at any length", "refused")
@pytest.mark.filterwarnings("ignore")
def test_no_shortened_file_is_read(tmp_path: Path) -> None:
    path = save(picture(noise(3, 6, 6)), tmp_path)
    content = path.read_bytes()
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError):
            check_image(path)


def test_a_dicom_file_of_another_name_gets_a_hint(tmp_path: Path) -> None:
    save(picture(noise(4, 4)), tmp_path).rename(tmp_path / "IM-0001")
    with pytest.raises(ImageError, match="it is DICOM, name it .dcm"):
        check_image(tmp_path / "IM-0001")
