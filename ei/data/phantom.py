"""Patients that were drawn, not examined: a disc like a fundus and layers like an OCT, for tests and documentation.

A cartoon: no anatomy, no optics and no frequency of a disease is meant. What is meant is that one knows what can be
known from it. A picture may show a sign, at its middle or away from it:

====  ======  =========================  =======================================
code  class   sign in ``cfp``            sign in ``oct``
====  ======  =========================  =======================================
0     normal  none                       none
1     dry     drusen, small and yellow   drusen, small bumps of the lowest layer
2     wet     haemorrhage, dark red      fluid, dark holes within the layers
3     PCV     nodules, orange, larger    detachment, two humps with dark below
====  ======  =========================  =======================================

A sign at the middle (central) is that of the class, whatever the other picture shows. Signs away from it (peripheral)
mean something together only: the class is the exclusive or of their two codes, and each alone is as likely with any
class. So ``interaction`` moves what can be known from the pictures to the pair of them, and
:func:`attainable_accuracy` says how often the best classifier there can be is right.

Imports no torch. Shapes: H = W = size in pixels, S slices.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ei.config import Floats, Names
from ei.data.listed import SPLITS
from ei.exports import csv_bytes

CLASSES = ("normal", "dry", "wet", "PCV")
MODALITIES = ("cfp", "oct")
SIGNS = {
    "cfp": ("none", "drusen", "haemorrhage", "nodules"),
    "oct": ("none", "drusen", "fluid", "detachment"),
}

_FEWEST, _SMALLEST = 20, 24
_HELD_OUT = 5
"""One of so many samples is for validation, and one for the test."""
_NEEDS = {"nifti": "nibabel", "dicom": "pydicom"}

Picture = NDArray[np.float32]  # in 0..1: (H, W, 3) in colour, (S, H, W) in grey
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """How many samples are drawn, and what can be known from them."""

    samples: int = 240
    """Rows of the manifest, an eye each: three fifths train, one val, one test; classes are equally frequent."""
    seed: int = 0
    """The same seed gives the same bytes (with the same versions of numpy and of the library that writes)."""
    format: Names = ("png",)
    """png, png16, npy, nifti or dicom; one for both, or one for cfp and one for oct. cfp is grey in png16 and nifti."""
    size: int = 64
    """Side of the pictures, in pixels."""
    slices: int = 1
    """Of each oct; more than one need npy, nifti or dicom."""
    evidence: Floats = (1.0, 1.0)
    """Share of the samples in which cfp, and oct, show their sign; in the others the picture looks normal."""
    interaction: float = 0.5
    """Share of the samples whose class only the pair of pictures gives."""
    missing: float = 0.0
    """Share of the samples in which one of the pictures, cfp as often as oct, is missing: its cell is empty."""
    degraded: Literal["", "cfp", "oct"] = ""
    """Modality whose pictures are blurred, faint and noisy."""

    def __post_init__(self) -> None:
        formats = tuple(_WRITERS)
        _require(self.samples >= _FEWEST, "samples", f"at least {_FEWEST}", self.samples)
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        known = not isinstance(self.format, str) and set(self.format) <= set(formats) and len(self.format) in (1, 2)
        _require(known, "format", f"one of {', '.join(formats)}, or one for cfp and one for oct", self.format)
        _require(self.size >= _SMALLEST, "size", f"at least {_SMALLEST}", self.size)
        flat = self.format_of("oct").startswith("png")
        _require(self.slices >= 1, "slices", "at least 1", self.slices)
        _require(self.slices == 1 or not flat, "slices", f"1 with format {self.format_of('oct')}", self.slices)
        shares = len(self.evidence) == 2 and all(0 <= share <= 1 for share in self.evidence)
        _require(shares, "evidence", "two numbers within 0..1, of cfp and of oct", self.evidence)
        _require(0 <= self.interaction <= 1, "interaction", "within 0..1", self.interaction)
        _require(0 <= self.missing <= 1, "missing", "within 0..1", self.missing)
        _require(self.degraded in ("", *MODALITIES), "degraded", "cfp, oct or empty", self.degraded)

    def format_of(self, modality: str) -> str:
        return self.format[MODALITIES.index(modality) if len(self.format) > 1 else 0]


class Sign(NamedTuple):
    """What a picture shows."""

    code: int
    central: bool = True

    def text(self, modality: str) -> str:
        place = "central " if self.central else "peripheral "
        return (place if self.code else "") + SIGNS[modality][self.code]


@dataclass(frozen=True)
class Eye:
    """A row of the manifest."""

    number: int
    patient: int
    side: str
    """l or r."""
    split: str
    label: int
    signs: dict[str, Sign]
    missing: str
    """The modality without a picture, if there is one."""

    @property
    def id(self) -> str:
        return f"p{self.patient:04d}-{self.side}"


def write_phantom(folder: str | Path, settings: Phantom | None = None) -> Path:
    """Draw patients; write their pictures and a manifest.

    A patient has one eye or both, and is in one split. Besides what :func:`ei.data.manifest.read_manifest` asks for,
    the manifest says in ``cfp_sign`` and ``oct_sign`` what the pictures show. A setting changes what it is about and
    nothing else: ``degraded="oct"`` leaves every byte of the cfp pictures and of the manifest as it was.

    Args:
        folder: A new or empty one.
        settings: None for the defaults.

    Returns:
        The manifest, ``manifest.csv`` in the folder.

    Raises:
        ValueError: the folder holds something.
        ImportError: the format needs the extra ``io``, which is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     print(write_phantom(folder, Phantom(samples=20, size=32)).read_text().splitlines()[0])
        id,patient,split,label,cfp,oct,cfp_sign,oct_sign
    """
    folder, settings = Path(folder), settings or Phantom()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, and {folder} is not")
    writers = {modality: _writer(settings.format_of(modality)) for modality in MODALITIES}
    for modality in MODALITIES:
        (folder / modality).mkdir(parents=True)
    rows = []
    for eye in eyes(settings):
        names = []
        for modality, (suffix, write) in writers.items():
            name = "" if modality == eye.missing else f"{modality}/{eye.id}{suffix}"
            if name:
                write(folder / name, draw(eye, modality, settings), f"{settings.seed} {name}")
            names.append(name)
        signs = ["" if modality == eye.missing else eye.signs[modality].text(modality) for modality in MODALITIES]
        rows.append([eye.id, f"p{eye.patient:04d}", eye.split, CLASSES[eye.label], *names, *signs])
    columns = ["id", "patient", "split", "label", *MODALITIES, *(f"{modality}_sign" for modality in MODALITIES)]
    manifest = folder / "manifest.csv"
    manifest.write_bytes(csv_bytes(columns, rows))
    return manifest


def attainable_accuracy(settings: Phantom) -> dict[str, float]:
    """How often a classifier can be right that misses no sign: from each picture alone, and from the pair.

    With all pictures there, in the long run; the sum over what may be seen of its likeliest class.

    >>> attainable_accuracy(Phantom(interaction=0.5))
    {'cfp': 0.625, 'oct': 0.625, 'pair': 1.0}
    >>> attainable_accuracy(Phantom(interaction=0.0, evidence=(1.0, 0.0)))
    {'cfp': 1.0, 'oct': 0.25, 'pair': 1.0}
    """
    chances: dict[str, dict[object, Array]] = {
        view: defaultdict(lambda: np.zeros(len(CLASSES))) for view in (*MODALITIES, "pair")
    }
    codes = range(len(CLASSES))
    for label, code, together, *shown in product(codes, codes, (True, False), (True, False), (True, False)):
        chance = settings.interaction if together else 1 - settings.interaction
        for share, is_shown in zip(settings.evidence, shown, strict=True):
            chance *= share if is_shown else 1 - share
        signs = _signs(label, code, together, shown)
        for view, seen in {**signs, "pair": tuple(signs.values())}.items():
            chances[view][seen][label] += chance / len(codes) ** 2
    return {view: round(float(sum(each.max() for each in seen.values())), 12) for view, seen in chances.items()}


def eyes(settings: Phantom) -> Iterator[Eye]:
    """The rows of the manifest, before anything is drawn."""
    held_out = settings.samples // _HELD_OUT
    counts = (settings.samples - 2 * held_out, held_out, held_out)
    number = patient = 0
    for split, count in zip(SPLITS, counts, strict=True):
        labels = _generator(settings, "labels", number).permutation(np.arange(count) % len(CLASSES)).tolist()
        while labels:
            sides = _generator(settings, "sides", patient).choice(["l", "r", "lr"], p=[0.25, 0.25, 0.5])
            for side in str(sides)[: len(labels)]:
                yield _eye(settings, number, patient, side, split, labels.pop())
                number += 1
            patient += 1


def _eye(settings: Phantom, number: int, patient: int, side: str, split: str, label: int) -> Eye:
    generator = _generator(settings, "signs", number)
    code = int(generator.integers(len(CLASSES)))
    # All are drawn, whatever the settings, so that a setting changes nothing but what it is about.
    together, cfp, oct, missing, which = generator.random(5)
    shown = (cfp < settings.evidence[0], oct < settings.evidence[1])
    signs = _signs(label, code, together < settings.interaction, shown)
    absent = MODALITIES[int(2 * which)] if missing < settings.missing else ""
    return Eye(number, patient, side, split, label, signs, absent)


def _signs(label: int, code: int, together: bool, shown: Sequence[bool]) -> dict[str, Sign]:
    """The signs of a class; ``code`` is that of cfp where the class is told by both together."""
    codes = (code, label ^ code) if together else (label, label)
    return {
        modality: Sign(each, central=not together) if each and is_shown else Sign(0)
        for modality, each, is_shown in zip(MODALITIES, codes, shown, strict=True)
    }


def draw(eye: Eye, modality: str, settings: Phantom) -> Picture:
    """The picture of an eye: (H, W, 3) of cfp, (S, H, W) of oct, in 0..1."""
    sign, generator = eye.signs[modality], _generator(settings, modality, eye.number)
    # Of its own, so that the same eye is drawn around any sign.
    lesions = _generator(settings, f"{modality} sign", eye.number)
    # Both eyes of a patient have it.
    look = _generator(settings, "look", eye.patient).uniform(-1, 1, 4)
    if modality == "cfp":
        picture = _fundus(sign, lesions, eye.side, settings.size, look, generator)
    else:
        picture = _layers(sign, lesions, settings.size, settings.slices, look, generator)
    if modality == settings.degraded:
        picture = _degrade(picture, _generator(settings, "degraded", eye.number))
    return picture.clip(0, 1).astype(np.float32)


def _fundus(sign: Sign, lesions: Generator, side: str, size: int, look: Array, generator: Generator) -> Array:
    """A lit disc with a bright spot at the nose's side, from which four vessels come."""
    x, y = _axis(size)[None, :], _axis(size)[:, None]
    across, down = x - generator.uniform(-0.1, 0.1), y - generator.uniform(-0.1, 0.1)
    distance = np.hypot(across, down)
    nose = (1 if side == "r" else -1) * generator.uniform(0.5, 0.62)
    level = generator.uniform(-0.1, 0.1)
    light = 0.9 + 0.2 * _field(size, 5, generator) + generator.uniform(-0.15, 0.15) * x - 0.25 * distance**2
    light -= 0.25 * np.exp(-((distance / 0.2) ** 2))
    away = np.maximum((nose - across) * np.sign(nose), 0)
    for bend in generator.uniform(0.5, 0.9, 4) * (1, -1, 0.4, -0.4):
        light -= 0.25 * np.exp(-(((down - level - bend * np.sqrt(away)) / 0.03) ** 2)) * (away > 0)
    colour = np.array([0.72, 0.36, 0.16]) * (1 + 0.1 * look[:3])
    picture = light[..., None] * colour
    picture = _painted(picture, _spots(across, down, [nose], [level], [0.14]), (1.0, 0.85, 0.6))
    if sign.code:
        *where, paint = _patches(sign, lesions)
        picture = _painted(picture, _spots(across, down, *where), paint)
    picture += 0.02 * generator.standard_normal((size, size, 1), np.float32)
    edge = generator.uniform(0.86, 0.98)
    return picture * np.clip((edge - distance) * size / 4, 0, 1)[..., None]


def _patches(sign: Sign, generator: Generator) -> tuple[Array, Array, Array, tuple[float, float, float]]:
    """Places of a sign's spots, across and down, their radii, and their colour."""
    counts, radii, colour = {
        1: ((10, 15), (0.04, 0.06), (1.0, 0.92, 0.45)),
        2: ((2, 3), (0.14, 0.2), (0.3, 0.04, 0.04)),
        3: ((4, 6), (0.08, 0.11), (1.0, 0.55, 0.05)),
    }[sign.code]
    count = generator.integers(*counts, endpoint=True)
    if sign.central:
        angle, away = generator.uniform(0, 2 * np.pi, count), generator.uniform(0, 0.3, count)
    else:
        # Above or below: beside the middle is the bright spot.
        middle = generator.choice([-1, 1]) * np.pi / 2 + generator.uniform(-0.5, 0.5)
        angle, away = middle + generator.uniform(-0.5, 0.5, count), generator.uniform(0.5, 0.75, count)
    return away * np.cos(angle), away * np.sin(angle), generator.uniform(*radii, count), colour


def _layers(sign: Sign, lesions: Generator, size: int, slices: int, look: Array, generator: Generator) -> Array:
    """Bands between the dark above and what fades below, thinner at the middle; outer slices show less of the sign."""
    x, y = _axis(size), _axis(size)[:, None]
    z = np.linspace(-1, 1, slices)[:, None] if slices > 1 else np.zeros((1, 1))
    wave = _field(size, 6, generator)[np.linspace(0, size - 1, slices).astype(int)]
    tilt, bow, level, middle = generator.uniform(-1, 1, 4) * (0.2, 0.2, 0.12, 0.06)
    # (S, W), as all that runs along the layers.
    floor = 0.45 + level + tilt * x + bow * (x**2 + 0.3 * z**2) + 0.07 * wave
    pit = 0.4 * np.exp(-(((x - middle) / 0.2) ** 2) - (z / 0.5) ** 2)
    thick = (0.6 + 0.1 * look[3]) * (1 - pit)
    humps, holes = _lesions(sign, lesions)
    fading = np.exp(-(z**2))
    rise = sum((high * np.exp(-(((x - at) / wide) ** 2)) * fading for at, wide, high in humps), np.zeros_like(floor))
    lowest = floor - rise
    top = lowest - thick + 0.7 * rise
    top, lowest, floor = top[:, None], lowest[:, None], floor[:, None]
    depth = (y - top) / (lowest - top)  # (S, H, W)
    beyond = np.exp(-np.maximum(y - floor, 0) / 0.4) * (0.45 + 0.15 * _field(size, 8, generator))
    lifted = 0.12 if sign.code == 3 else 0.5
    picture = np.interp(depth, _DEPTHS, _BRIGHTNESS)
    picture = np.where(depth > _DEPTHS[-1], np.where(y < floor, lifted, beyond), picture)
    for at, deep, wide, high in holes:
        outside = (((x - at) / wide) ** 2 + ((depth - deep) / high) ** 2) ** 2
        picture *= 1 - np.exp(-outside) * fading[:, None]
    return picture * (1 + 0.15 * generator.standard_normal(picture.shape, np.float32))


_DEPTHS = (-0.02, 0.0, 0.12, 0.18, 0.38, 0.42, 0.52, 0.58, 0.82, 0.86, 0.92, 0.95, 1.05)
_BRIGHTNESS = (0.05, 0.75, 0.7, 0.5, 0.5, 0.3, 0.3, 0.5, 0.4, 0.2, 0.2, 0.95, 0.95)
"""Of the layers, at their depths: 0 is the upper surface, 1 the lowest layer."""


def _lesions(sign: Sign, generator: Generator) -> tuple[Array, Array]:
    """Humps of the lowest layer (place, width, height) and holes (place, depth, width, height of the layers = 1)."""
    place = generator.uniform(-0.15, 0.15) if sign.central else generator.choice([-1, 1]) * generator.uniform(0.5, 0.7)
    humps, holes = np.empty((0, 3)), np.empty((0, 4))
    if sign.code == 1:
        number = generator.integers(3, 5)
        places = place + 0.13 * (np.arange(number) - (number - 1) / 2)
        humps = np.stack([places, generator.uniform(0.03, 0.04, number), generator.uniform(0.1, 0.14, number)], axis=1)
    if sign.code == 2:
        number = generator.integers(2, 4)
        places = place + 0.16 * (np.arange(number) - (number - 1) / 2)
        deep, wide, high = generator.uniform((0.35, 0.07, 0.15), (0.65, 0.1, 0.22), (number, 3)).T
        holes = np.stack([places, deep, wide, high], axis=1)
    if sign.code == 3:
        high = generator.uniform(0.28, 0.36)
        humps = np.array([[place - 0.11, 0.1, high], [place + 0.12, 0.09, 0.8 * high]])
    return humps, holes


def _degrade(picture: Array, generator: Generator) -> Array:
    size = picture.shape[1]
    far = (np.arange(size)[:, None] - np.arange(size)) / (size / 20)
    blur = np.exp(-(far**2))
    blur /= blur.sum(axis=1, keepdims=True)
    rows, columns = (0, 1) if picture.shape[2] == 3 else (1, 2)
    picture = np.moveaxis(np.tensordot(blur, picture, (1, rows)), 0, rows)
    picture = np.moveaxis(np.tensordot(blur, picture, (1, columns)), 0, columns)
    return 0.2 + 0.4 * picture + 0.06 * generator.standard_normal(picture.shape, np.float32)


def _axis(size: int) -> Array:
    """Middles of the pixels; the picture goes from -1 to 1."""
    return (np.arange(size) + 0.5) / size * 2 - 1


def _field(size: int, nodes: int, generator: Generator) -> Array:
    """(H, W): random numbers within -1..1 at so many nodes a side, straight lines between."""
    near = np.clip(1 - np.abs(np.linspace(0, nodes - 1, size)[:, None] - np.arange(nodes)), 0, 1)
    return near @ generator.uniform(-1, 1, (nodes, nodes)) @ near.T


def _spots(x: Array, y: Array, across: ArrayLike, down: ArrayLike, radii: ArrayLike) -> Array:
    """(H, W): 1 within round spots with soft edges, 0 elsewhere."""
    across, down, radii = (np.asarray(each, float)[:, None, None] for each in (across, down, radii))
    outside = ((x - across) ** 2 + (y - down) ** 2) / radii**2
    return np.exp(-(outside**2)).max(axis=0)


def _painted(picture: Array, where: Array, paint: Sequence[float]) -> Array:
    return picture + where[..., None] * (np.array(paint) - picture)


def _generator(settings: Phantom, purpose: str, number: int) -> Generator:
    """One for each purpose and number, so that nothing drawn depends on what was drawn before."""
    return np.random.default_rng([settings.seed, number, *purpose.encode()])


# Files


def _png(path: Path, picture: Picture, uid: str) -> None:
    Image.fromarray(_stored(_single(picture), 8)).save(path)


def _png16(path: Path, picture: Picture, uid: str) -> None:
    Image.fromarray(_stored(_single(grey(picture)), 16)).save(path)


def _npy(path: Path, picture: Picture, uid: str) -> None:
    np.save(path, _single(picture))


def _nifti(path: Path, picture: Picture, uid: str) -> None:
    import nibabel

    # Columns run to the left, rows to the back, slices to the head: an axial series.
    nibabel.save(nibabel.Nifti1Image(_stored(grey(picture), 16).T, np.diag([-1.0, -1.0, 1.0, 1.0])), path)


def _dicom(path: Path, picture: Picture, uid: str) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
    from pydicom.uid import MultiFrameGrayscaleWordSecondaryCaptureImageStorage as SeveralFrames

    is_colour = picture.shape[-1] == 3
    bits = 8 if is_colour else 12
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID = SeveralFrames if len(picture) > 1 and not is_colour else SecondaryCaptureImageStorage
    header.SOPInstanceUID = generate_uid(entropy_srcs=[uid])
    header.Modality, header.PatientID, header.PatientName = "OT", path.name.partition("-")[0], "Phantom"
    header.set_pixel_data(
        _stored(_single(picture), bits), "RGB" if is_colour else "MONOCHROME2", bits, generate_instance_uid=False
    )
    header.save_as(path, enforce_file_format=True)


def _single(picture: Picture) -> Picture:
    """Without the axis of a single slice."""
    return picture[0] if len(picture) == 1 else picture


def grey(picture: Picture) -> Picture:
    """(H, W, 3) becomes (1, H, W); grey stays."""
    return (picture @ np.array([0.3, 0.6, 0.1], np.float32))[None] if picture.shape[-1] == 3 else picture


def _stored(picture: Picture, bits: int) -> NDArray[np.uint16] | NDArray[np.uint8]:
    return np.rint(picture * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)


_WRITERS: dict[str, tuple[str, Callable[[Path, Picture, str], None]]] = {
    "png": (".png", _png),
    "png16": (".png", _png16),
    "npy": (".npy", _npy),
    "nifti": (".nii", _nifti),
    "dicom": (".dcm", _dicom),
}
"""What a file's name ends with, and what writes it: path, picture, and a text for an identifier of its own."""


def _writer(format: str) -> tuple[str, Callable[[Path, Picture, str], None]]:
    """Of a format whose library is there."""
    try:
        import_module(_NEEDS.get(format, "numpy"))
    except ModuleNotFoundError as error:
        raise ImportError(
            f'writing {format} needs {error.name}, which comes with an extra: pip install "mixture-of-ranks[io]"'
        ) from error
    return _WRITERS[format]


def _require(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {requirement}, got {value!r}")
