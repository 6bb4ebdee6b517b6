"""MMC-AMD: colour fundus photographs (cfp) and OCT scans of the same eyes, in four classes.

The layout that is read, below ``VisualSearch/``, and nothing else of it::

    mmc-amd/ImageData/{cfp-clahe-448x448/f-*.jpg, oct-median3x3-448x448/o-*.jpg}
    mmc-amd-splitAP-{train,val,test}/ImageSets/{cfp,oct}.txt      an image id per line
    mmc-amd-splitAP-{train,val,test}/annotations/{cfp,oct}.txt    an image id and a label 0..3 per line

A row of the manifest is an eye that has images of both kinds; all of them are listed. An image id such as
``o-w-28559-r_002`` is: o for OCT (f for CFP), w for wet AMD, the eye, and a number that says nothing about pairs.
The eye is the patient and its side, l or r, which may be missing.

Source: li-xirong/mmc-amd; pairs by eye, 610 / 79 / 79, as arXiv 2603.17514.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ei.data.manifest import SPLITS
from ei.data.prepare import (
    Case,
    Prepared,
    Skip,
    Source,
    find_home,
    read_lines,
    require_counts,
    require_files,
    require_folder,
    require_once,
)

MODALITIES = ("cfp", "oct")
CLASSES = ("normal", "dryAMD", "PCV", "wetAMD")
RELEASED = {
    "AP": {
        "train cfp images": 934,
        "val cfp images": 80,
        "test cfp images": 80,
        "train oct images": 1024,
        "val oct images": 134,
        "test oct images": 131,
        "train pairs": 610,
        "val pairs": 79,
        "test pairs": 79,
    },
    "A": {"cfp images": 1094, "oct images": 1289},
}

_LETTERS = "hdpw"
_PREFIX = {"cfp": "f", "oct": "o"}
_IMAGE_ID = re.compile(rf"([fo])-([{_LETTERS}])-([^_\s/\\]+)(_[^\s/\\]*)?")
_SYNTHETIC = re.compile(r"-(trs|ori|flr)(?![A-Za-z0-9])")
_SIDE = re.compile(r"-[lr]$")


@dataclass(frozen=True)
class MmcAmd(Source):
    """MMC-AMD: ROOT is the folder VisualSearch; writes a row per eye that has both CFP and OCT."""

    split: Literal["AP", "A"] = "AP"
    """AP: no patient is in two splits. A: no eye is; fellow eyes may be, so each eye then counts as a patient."""
    cfp_folder: str = "cfp-clahe-448x448"
    """Folder of the CFP images in mmc-amd/ImageData."""
    oct_folder: str = "oct-median3x3-448x448"
    """Folder of the OCT images in mmc-amd/ImageData."""

    def read(self) -> Prepared:
        home = find_home(self.root, "VisualSearch", "mmc-amd")
        folders = {
            "cfp": _image_folder(home, self.cfp_folder, "--cfp-folder"),
            "oct": _image_folder(home, self.oct_folder, "--oct-folder"),
        }
        images = list(self._listed(home, folders))
        for modality in MODALITIES:
            require_once((image.id for image in images if image.modality == modality), f"ImageSets/{modality}.txt")
        real = [image for image in images if not image.synthetic]
        if not self.partial:
            require_counts(home, _counts(real, self.split), RELEASED[self.split])
        missing = require_files((image.file for image in real), "ImageSets", self.partial)
        eyes = _by_eye([image for image in real if image.file not in missing])
        pairs = {key: found for key, found in eyes.items() if all(found.values())}
        return Prepared(
            cases=[_case(split, eye, found, self.split) for (split, eye), found in pairs.items()],
            skipped=[
                *(Skip(image.split, image.id, "a synthetic image") for image in images if image.synthetic),
                *(Skip(image.split, image.id, "no such file") for image in real if image.file in missing),
                *_unpaired(eyes),
            ],
            notes=self._fellow_eyes(pairs),
            modalities=MODALITIES,
            labels=("label",),
            classes=CLASSES,
            flags=("--config", "mmc-amd-clip"),
        )

    def _listed(self, home: Path, folders: Mapping[str, Path]) -> Iterator["_Image"]:
        for split in SPLITS:
            collection = require_folder(home / f"mmc-amd-split{self.split}-{split}")
            for modality in MODALITIES:
                listing = collection / "ImageSets" / f"{modality}.txt"
                labels = _annotations(collection / "annotations" / f"{modality}.txt")
                for name in read_lines(listing):
                    image = _parsed(name, split, modality, folders[modality], listing)
                    if not image.synthetic:
                        _require_label(image, labels, collection)
                    yield image

    def _fellow_eyes(self, pairs: Mapping[tuple[str, str], object]) -> list[str]:
        """A note on the patients with eyes in two splits, which AP may not have."""
        splits = defaultdict(set)
        for split, eye in pairs:
            splits[_patient(eye)].add(split)
        shared = sorted(patient for patient, found in splits.items() if len(found) > 1)
        if shared and self.split == "AP":
            raise ValueError(f"split AP must have no patient in two splits, got {', '.join(shared[:5])}")
        if shared:
            return [f"{len(shared)} patients have an eye in one split and the fellow eye in another; AP has none"]
        return []


@dataclass(frozen=True)
class _Image:
    split: str
    modality: str
    id: str
    letter: str
    eye: str
    """With the letter of the class first, because the two eyes of a patient may differ in it."""
    synthetic: bool
    file: Path


def _image_folder(home: Path, name: str, flag: str) -> Path:
    return require_folder(home / "mmc-amd" / "ImageData" / name, f"name it with {flag}")


def _parsed(name: str, split: str, modality: str, folder: Path, listing: Path) -> _Image:
    match = _IMAGE_ID.fullmatch(name)
    if match is None or match[1] != _PREFIX[modality]:
        wanted = f"{_PREFIX[modality]}-<one of {_LETTERS}>-<eye>"
        raise ValueError(f"{listing} must have image ids such as {wanted}, got {name!r}")
    eye = f"{match[2]}-{_SYNTHETIC.sub('', match[3])}"
    synthetic = _SYNTHETIC.search(name) is not None
    return _Image(split, modality, name, match[2], eye, synthetic, folder / f"{name}.jpg")


def _annotations(path: Path) -> dict[str, str]:
    """Image id -> label, the last word of a line."""
    lines = [line.split() for line in read_lines(path)]
    require_once((words[0] for words in lines), str(path))
    return {words[0]: words[-1] for words in lines}


def _require_label(image: _Image, labels: Mapping[str, str], collection: Path) -> None:
    """The label of the annotations must be that of the image's name."""
    expected = str(_LETTERS.index(image.letter))
    if labels.get(image.id) != expected:
        path = collection / "annotations" / f"{image.modality}.txt"
        raise ValueError(f"{path} must give {image.id} the label {expected}, got {labels.get(image.id, 'none')}")


def _by_eye(images: Sequence[_Image]) -> dict[tuple[str, str], dict[str, list[_Image]]]:
    """(Split, eye) -> modality -> its images, in the order of the lists."""
    eyes: dict[tuple[str, str], dict[str, list[_Image]]] = {}
    for image in images:
        eyes.setdefault((image.split, image.eye), {name: [] for name in MODALITIES})[image.modality].append(image)
    require_once((eye for _, eye in eyes), "the three splits")
    return eyes


def _unpaired(eyes: Mapping[tuple[str, str], Mapping[str, Sequence[_Image]]]) -> list[Skip]:
    return [
        Skip(split, eye, f"no {modality.upper()} image")
        for (split, eye), found in eyes.items()
        for modality in MODALITIES
        if not found[modality]
    ]


def _counts(images: Sequence[_Image], split_name: str) -> dict[str, int]:
    if split_name == "A":
        return {f"{name} images": sum(image.modality == name for image in images) for name in MODALITIES}
    counts = {
        f"{split} {name} images": sum(image.split == split and image.modality == name for image in images)
        for split in SPLITS
        for name in MODALITIES
    }
    eyes = _by_eye(images)
    paired = [split for (split, _), found in eyes.items() if all(found.values())]
    return counts | {f"{split} pairs": paired.count(split) for split in SPLITS}


def _case(split: str, eye: str, found: Mapping[str, Sequence[_Image]], split_name: str) -> Case:
    return Case(
        id=eye,
        patient=_patient(eye) if split_name == "AP" else eye,
        split=split,
        labels={"label": CLASSES[_LETTERS.index(eye[0])]},
        images={modality: tuple(image.file for image in images) for modality, images in found.items()},
    )


def _patient(eye: str) -> str:
    return _SIDE.sub("", eye[2:])
