"""The phantom: the same bytes from the same seed, every format the same picture, and knobs that do what they say."""

import csv
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ei.check import check_manifest
from ei.cli import run
from ei.config import Config, DataConfig, ModelConfig
from ei.data.images import count_slices, read_image
from ei.data.phantom import (
    CLASSES,
    MODALITIES,
    SIGNS,
    Eye,
    Phantom,
    Sign,
    attainable_accuracy,
    draw,
    eyes,
    grey,
    write_phantom,
)

SMALL = Phantom(samples=20, size=32)
FORMATS = ("png", "png16", "npy", "nifti", "dicom")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def needs(format: str) -> None:
    pytest.importorskip({"nifti": "nibabel", "dicom": "pydicom"}.get(format, "numpy"))


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, format: str) -> None:
    needs(format)
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        write_phantom(tmp_path / name, replace(SMALL, format=(format,), seed=seed))
    one, same, other = (content(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert not set(one.values()) & set(other.values())
    assert len(set(one.values())) == len(one) == 41


@pytest.mark.parametrize(
    ("format", "slices", "cfp_steps", "oct_steps"),
    [
        ("png", 1, 255, 255),
        ("png16", 1, 65535, 65535),
        ("npy", 1, 0, 0),
        ("npy", 7, 0, 0),
        ("nifti", 1, 65535, 65535),
        ("nifti", 7, 65535, 65535),
        ("dicom", 1, 255, 4095),
        ("dicom", 7, 255, 4095),
    ],
)
def test_a_file_gives_back_the_picture(
    tmp_path: Path, format: str, slices: int, cfp_steps: int, oct_steps: int
) -> None:
    needs(format)
    settings = replace(SMALL, format=(format,), slices=slices)
    table = rows(write_phantom(tmp_path, settings))
    for eye, row in list(zip(eyes(settings), table, strict=True))[:6]:
        cfp, oct = (draw(eye, modality, settings) for modality in MODALITIES)
        colour = np.moveaxis(cfp, 2, 0)[None] if format in ("png", "npy", "dicom") else grey(cfp)[:, None]
        for name, picture, steps in ((row["cfp"], colour, cfp_steps), (row["oct"], oct[:, None], oct_steps)):
            read = read_image(tmp_path / name).numpy()
            assert read.shape == (len(picture), 3, 32, 32) and count_slices(tmp_path / name) == len(picture)
            np.testing.assert_allclose(
                read, np.broadcast_to(picture, read.shape), atol=0.5 / steps + 1e-6 if steps else 0
            )
    assert oct.shape == (slices, 32, 32)


def test_arrays_of_three_slices_might_be_colours(tmp_path: Path) -> None:
    settings = Phantom(samples=60, size=32, format=("png", "npy"), slices=3)
    (warning,) = check_manifest(write_phantom(tmp_path, settings), DataConfig(classes=CLASSES)).warnings
    assert warning.text.startswith("oct: its .npy files are read as three grey slices")


@pytest.mark.parametrize(
    "settings",
    [
        Phantom(samples=200),
        Phantom(samples=60, seed=1, size=128, format=("png16", "nifti"), slices=5, degraded="cfp"),
        Phantom(samples=60, seed=2, size=32, format=("dicom", "npy"), slices=4, degraded="oct", evidence=(0.0, 0.0)),
    ],
)
def test_the_check_finds_nothing(tmp_path: Path, settings: Phantom) -> None:
    for format in settings.format:
        needs(format)
    report = check_manifest(write_phantom(tmp_path, settings), DataConfig(classes=CLASSES))
    assert (report.faults, report.warnings) == ((), ())
    assert report.modalities == MODALITIES
    fifth = settings.samples // 5
    assert report.rows == {"train": 3 * fifth, "val": fifth, "test": fifth}


def test_patients_have_one_eye_or_two_in_one_split_and_classes_are_balanced() -> None:
    drawn = list(eyes(Phantom(samples=203)))
    by_patient: dict[int, list[Eye]] = {}
    for eye in drawn:
        by_patient.setdefault(eye.patient, []).append(eye)
    assert {len(each) for each in by_patient.values()} == {1, 2}
    assert all(len({eye.split for eye in each}) == 1 for each in by_patient.values())
    assert len({eye.id for eye in drawn}) == len(drawn) == 203
    for split, count in (("train", 123), ("val", 40), ("test", 40)):
        classes = Counter(eye.label for eye in drawn if eye.split == split)
        assert sum(classes.values()) == count and set(classes) == {0, 1, 2, 3}
        assert max(classes.values()) - min(classes.values()) <= 1
    assert len({eye.side for eye in drawn}) == 2


def test_a_setting_changes_what_it_is_about_and_nothing_else(tmp_path: Path) -> None:
    changes = {
        "as it is": {},
        "degraded": {"degraded": "oct"},
        "missing": {"missing": 0.5},
        "blind": {"evidence": (0, 1)},
    }
    files = {}
    for name, change in changes.items():
        write_phantom(tmp_path / name, replace(SMALL, **change))
        files[name] = content(tmp_path / name)
    before = files["as it is"]
    changed = {name for name in before if before[name] != files["degraded"][name]}
    assert changed == {name for name in before if name.startswith("oct/")}
    assert files["missing"].items() - before.items() == {("manifest.csv", files["missing"]["manifest.csv"])}
    table = rows(tmp_path / "as it is" / "manifest.csv")
    with_sign = {row["cfp"] for row in table if row["cfp_sign"] != "none"}
    assert {name for name in before if before[name] != files["blind"][name]} == with_sign | {"manifest.csv"}
    assert all(row["cfp_sign"] == "none" for row in rows(tmp_path / "blind" / "manifest.csv"))


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_sign_is_where_it_is_said_to_be(modality: str) -> None:
    """The picture of the same eye without the sign differs there, and nowhere else."""
    settings = Phantom(slices=1)
    for eye in list(eyes(settings))[:20]:
        without = draw(replace(eye, signs={modality: Sign(0)}), modality, settings)
        for code in (1, 2, 3):
            middle = []
            for central in (True, False):
                picture = draw(replace(eye, signs={modality: Sign(code, central)}), modality, settings)
                change = np.abs(picture - without).reshape(-1, 64, 64, 3 if modality == "cfp" else 1).max((0, 3))
                x = np.abs((np.arange(64) + 0.5) / 32 - 1)
                away = np.hypot(x, x[:, None]) if modality == "cfp" else np.broadcast_to(x, (64, 64))
                assert 10 < (change > 0.1).sum() < 64 * 64 / 5
                middle.append((away * change).sum() / change.sum())
            assert middle[0] < 0.35 < 0.4 < middle[1]


def fundus_marks(picture: np.ndarray) -> list[float]:
    """How much is yellow, dark red and orange, at the middle and away from it."""
    axis = (np.arange(len(picture)) + 0.5) / len(picture) * 2 - 1
    x, y = np.abs(axis), np.abs(axis)[:, None]
    red, green, blue = np.moveaxis(picture, 2, 0)
    marks = (green > 0.6, (red < 0.42) & (green < 0.16), (red > 0.85) & (green > 0.4) & (green < 0.68) & (blue < 0.3))
    places = ((np.hypot(x, y) < 0.4) & (x < 0.42), (y > 0.38) & (np.hypot(x, y) < 0.82))
    return [mark[place].mean() for mark in marks for place in places]


def layer_marks(picture: np.ndarray) -> list[float]:
    """How rough the lowest layer is, how much is dark below it, and how much above; at the middle and away from it."""
    size = picture.shape[1]
    scan, x = picture[len(picture) // 2], np.abs((np.arange(size) + 0.5) / size * 2 - 1)
    down = np.arange(size)[:, None]
    lowest, highest = size - 1 - (scan[::-1] > 0.68).argmax(0), (scan > 0.35).argmax(0)
    rough = np.minimum(np.abs(np.diff(lowest, 2, prepend=lowest[0], append=lowest[-1])), 6)
    below = ((scan < 0.22) & (down > lowest) & (down <= lowest + size * 0.1)).sum(0)
    holes = ((scan < 0.12) & (down > highest) & (down < lowest)).sum(0)
    return [mark[place].mean() for place in (x < 0.4, x > 0.4) for mark in (rough, below, holes)]


MARKS = {"cfp": fundus_marks, "oct": layer_marks}


class Readers:
    """Classifiers by simple marks: of each picture alone, and of what is seen in both; trained on the train rows."""

    def __init__(self, settings: Phantom) -> None:
        self.eyes = list(eyes(settings))
        self.pictures = {name: [draw(eye, name, settings) for eye in self.eyes] for name in MODALITIES}
        self.labels = np.array([eye.label for eye in self.eyes])
        self.train = np.array([eye.split == "train" for eye in self.eyes])
        self.marks = {name: np.array(list(map(MARKS[name], self.pictures[name]))) for name in MODALITIES}

    def accuracy(self, values: np.ndarray, regularised: float = 100.0) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=regularised, max_iter=2000))
        model.fit(values[self.train], self.labels[self.train])
        return model.score(values[~self.train], self.labels[~self.train])

    def alone(self, modality: str) -> float:
        return self.accuracy(self.marks[modality])

    def pair(self) -> float:
        """First the sign of each picture, then the class of both signs."""
        seen = [self.signs_seen(modality) for modality in MODALITIES]
        return self.accuracy((seen[0][:, :, None] * seen[1][:, None]).reshape(len(self.eyes), -1))

    def signs_seen(self, modality: str) -> np.ndarray:
        signs = np.array([eye.signs[modality].text(modality) for eye in self.eyes])
        model = make_pipeline(StandardScaler(), LogisticRegression(C=100, max_iter=2000))
        return model.fit(self.marks[modality][self.train], signs[self.train]).predict_proba(self.marks[modality])

    def nearest_mean(self, modality: str) -> float:
        """Of the pixels themselves, in blocks of 4 x 4."""
        blocks = [picture.reshape(-1, 16, 4, 16, 4, picture.shape[-1] % 64 or 1) for picture in self.pictures[modality]]
        values = np.array([block.mean((2, 4)).ravel() for block in blocks])
        means = np.stack([values[self.train & (self.labels == label)].mean(0) for label in range(len(CLASSES))])
        nearest = np.square(values[:, None] - means).sum(2).argmin(1)
        return (nearest == self.labels)[~self.train].mean()


@cache
def readers_of(settings: Phantom) -> Readers:
    return Readers(settings)


SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
READ = Phantom(samples=500, interaction=0.0)
CHANCE = 0.25 + 0.1  # two standard deviations of 200 guesses, and some


@SEEDS
@pytest.mark.parametrize("blind", MODALITIES)
def test_without_evidence_a_picture_tells_nothing(seed: int, blind: str) -> None:
    evidence = tuple(float(modality != blind) for modality in MODALITIES)
    readers = readers_of(replace(READ, seed=seed, evidence=evidence))
    (sighted,) = set(MODALITIES) - {blind}
    assert max(readers.alone(blind), readers.nearest_mean(blind)) < CHANCE
    assert readers.alone(sighted) > 0.85 and readers.nearest_mean(sighted) > 0.4


@SEEDS
def test_with_half_of_the_evidence_half_of_the_signs_are_seen(seed: int) -> None:
    readers = readers_of(replace(READ, seed=seed, evidence=(0.5, 0.5)))
    best = attainable_accuracy(Phantom(interaction=0.0, evidence=(0.5, 0.5)))
    assert best == {"cfp": 0.625, "oct": 0.625, "pair": 0.8125}
    for modality in MODALITIES:
        assert abs(readers.alone(modality) - best[modality]) < 0.12
    assert abs(readers.pair() - best["pair"]) < 0.12


@SEEDS
@pytest.mark.parametrize("interaction", [0.5, 1.0])
def test_interaction_moves_what_can_be_known_to_the_pair(seed: int, interaction: float) -> None:
    readers = readers_of(replace(READ, seed=seed, interaction=interaction))
    best = attainable_accuracy(Phantom(interaction=interaction))
    assert best == {"cfp": 1 - 0.75 * interaction, "oct": 1 - 0.75 * interaction, "pair": 1.0}
    assert all(readers.alone(modality) < best[modality] + 0.1 for modality in MODALITIES)
    assert readers.pair() > 0.85


@SEEDS
@pytest.mark.parametrize("degraded", MODALITIES)
def test_a_degraded_modality_is_harder_to_read(seed: int, degraded: str) -> None:
    clear, poor = (readers_of(replace(READ, seed=seed, degraded=name)) for name in ("", degraded))
    assert poor.alone(degraded) < clear.alone(degraded) - 0.15
    assert poor.pictures[degraded][0].std() < 0.7 * clear.pictures[degraded][0].std()


def test_what_is_attainable_is_what_knowing_the_signs_attains() -> None:
    settings = Phantom(samples=8000, interaction=0.4, evidence=(0.9, 0.6))
    drawn = list(eyes(settings))
    for view, best in attainable_accuracy(settings).items():
        seen: dict[object, Counter[int]] = {}
        for eye in drawn:
            key = tuple(eye.signs.values()) if view == "pair" else eye.signs[view]
            seen.setdefault(key, Counter())[eye.label] += 1
        assert abs(sum(max(classes.values()) for classes in seen.values()) / len(drawn) - best) < 0.03


def test_missing_pictures(tmp_path: Path) -> None:
    table = rows(write_phantom(tmp_path, replace(SMALL, samples=300, missing=0.4)))
    absent = Counter(tuple(modality for modality in MODALITIES if not row[modality]) for row in table)
    assert set(absent) == {(), ("cfp",), ("oct",)}
    assert all(bool(row[modality]) == bool(row[f"{modality}_sign"]) for row in table for modality in MODALITIES)
    assert abs(absent[()] / 300 - 0.6) < 0.09
    assert abs(absent["cfp",] - absent["oct",]) < 45
    listed = {row[modality] for row in table for modality in MODALITIES} - {""}
    assert listed == set(content(tmp_path)) - {"manifest.csv"}
    everywhere = list(eyes(replace(SMALL, missing=1.0)))
    assert {eye.missing for eye in everywhere} == set(MODALITIES)


def test_volumes_show_their_sign_in_all_slices_and_most_in_the_middle() -> None:
    settings = Phantom(samples=20, slices=9, format=("npy",))
    for code in (1, 2, 3):
        changes = np.zeros(9)
        for eye in eyes(settings):
            sign, none = (draw(replace(eye, signs={"oct": Sign(each)}), "oct", settings) for each in (code, 0))
            change = np.abs(sign - none).sum((1, 2))
            assert change.min() > 0
            changes += change
        assert changes[4] > 1.2 * max(changes[0], changes[8])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 19}, "samples must be at least 20, got 19"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"format": ("jpeg",)}, r"format must be one of png, png16, npy, nifti, dicom, or one .* got \('jpeg',\)"),
        ({"format": ("png", "png", "png")}, "format must be one of"),
        ({"format": "png"}, "format must be one of"),
        ({"size": 8}, "size must be at least 24"),
        ({"slices": 0}, "slices must be at least 1"),
        ({"slices": 3}, "slices must be 1 with format png, got 3"),
        ({"slices": 3, "format": ("npy", "png16")}, "slices must be 1 with format png16, got 3"),
        ({"evidence": (1.0,)}, "evidence must be two numbers within 0..1"),
        ({"evidence": (1.0, 1.1)}, "evidence must be two numbers within 0..1"),
        ({"interaction": float("nan")}, "interaction must be within 0..1"),
        ({"missing": -0.1}, "missing must be within 0..1"),
        ({"degraded": "faf"}, "degraded must be cfp, oct or empty, got 'faf'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phantom(**settings)


def test_only_a_new_or_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_phantom(tmp_path / "empty", SMALL)
    (tmp_path / "file").write_text("x")
    before = content(tmp_path)
    for name in ("empty", "file"):
        with pytest.raises(ValueError, match=f"folder must be new or empty, and .*{name} is not"):
            write_phantom(tmp_path / name, SMALL)
    assert content(tmp_path) == before


@pytest.mark.parametrize(("format", "module"), [("nifti", "nibabel"), ("dicom", "pydicom")])
def test_without_the_extra_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'writing {format} needs {module}, .* pip install "mixture-of-ranks\[io\]"'):
        write_phantom(tmp_path / "new", replace(SMALL, format=("png", format)))
    assert not (tmp_path / "new").exists()


def test_the_signs_have_names() -> None:
    assert all(len(SIGNS[modality]) == len(CLASSES) == 4 for modality in MODALITIES)
    assert (Sign(0).text("cfp"), Sign(2).text("oct"), Sign(3, False).text("cfp")) == (
        "none",
        "central fluid",
        "peripheral nodules",
    )


def test_from_the_command_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = "--samples 20 --size 32 --format png,npy --slices 3 --interaction 0 --evidence 1,0.5 --seed 5"
    assert run(["phantom", "--out", str(tmp_path / "data"), *drawing.split()]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "the best accuracy there can be: cfp 1.000, oct 0.625, pair 1.000"
    small = "--backbone tiny --epochs 1 --bootstrap 0 --device cpu --slices 2 --image-size 16 --out"
    assert run([*last.removeprefix("next: ei ").split(), *small.split(), str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    config = Config.load(tmp_path / "run" / "config.yaml")
    assert config.data.classes == CLASSES and config.model == ModelConfig(backbone="tiny")
