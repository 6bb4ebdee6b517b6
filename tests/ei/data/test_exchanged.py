"""Rows whose cells were exchanged are told, and rows of modalities that look alike never are."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ei.config import DataConfig
from ei.data import exchanged, listed
from ei.data.audit import Facts
from ei.data.exchanged import compare_modalities
from ei.data.listed import ListedFile
from ei.data.manifest import read_manifest

PHOTO, CAMERA, SCAN = (1500, 2000), (2848, 4288), (496, 512)


def looks(
    count: int, generator: np.random.Generator, mean: tuple[float, ...], sizes: list[tuple[int, int]], common: float = 1
) -> NDArray[np.float64]:
    """(N, 6); the first size is that of the share ``common``."""
    which = (generator.random(count) >= common).astype(int)
    parts = [np.array([*sizes, *sizes])[which], np.ones((count, 1)), generator.normal(mean, 0.04, (count, 3))]
    return np.concatenate(parts, axis=1)


def table(**columns: NDArray[np.float64]) -> list[ListedFile]:
    """Row 2 is the first."""
    return [
        ListedFile(
            row, "train", f"p{row}", modality, f"{modality}{row}.png", f"/{modality}{row}.png",
            Facts(f"{modality}{row}", appearance=tuple(look)),
        )
        for modality, column in columns.items()
        for row, look in enumerate(column.tolist(), start=2)
    ]  # fmt: skip


def swapped(one: NDArray[np.float64], other: NDArray[np.float64], rows: list[int]) -> None:
    where = np.array(rows, int) - 2
    one[where], other[where] = other[where].copy(), one[where].copy()


def told(files: list[ListedFile]) -> list[int]:
    return [fault.row for fault in compare_modalities(files)]


def eyes(count: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Colour photos of two cameras, and grey scans."""
    generator = np.random.default_rng(seed)
    return looks(count, generator, (0.3, 0.35, 0.2), [PHOTO, CAMERA], 0.7), looks(
        count, generator, (0, 0.2, 0.2), [SCAN]
    )


@pytest.mark.fault("the cells of two modalities exchanged in some rows", "warned of, by row")
@pytest.mark.parametrize(("count", "rows"), [(20, [9]), (60, [2, 30, 61]), (1000, [2, 17, 500, 501, 1001])])
def test_exchanged_cells_are_told(count: int, rows: list[int]) -> None:
    cfp, oct_ = eyes(count)
    assert told(table(cfp=cfp, oct=oct_)) == []
    swapped(cfp, oct_, rows)
    found = compare_modalities(table(cfp=cfp, oct=oct_))
    assert [fault.row for fault in found] == rows
    row = rows[0]
    assert found[0].text == (
        f"cfp and oct look exchanged: 'cfp{row}.png' is like oct of other rows, 'oct{row}.png' like cfp"
    )


@pytest.mark.parametrize("seed", range(5))
def test_many_exchanged_cells_are_mostly_told(seed: int) -> None:
    cfp, oct_ = eyes(400, seed)
    rows = np.random.default_rng(seed).choice(400, 20, replace=False) + 2
    swapped(cfp, oct_, rows.tolist())
    found = told(table(cfp=cfp, oct=oct_))
    assert set(found) <= set(rows.tolist())
    assert len(found) >= 14


@pytest.mark.fault("modalities that look alike, exchanged or not", "nothing is said")
@pytest.mark.parametrize("apart", [0, 1, 2, 3], ids=lambda apart: f"{apart} standard deviations apart")
@pytest.mark.parametrize("count", [20, 40, 200])
def test_modalities_that_look_alike_are_never_told(count: int, apart: int) -> None:
    for seed in range(20):
        generator = np.random.default_rng([seed, apart])
        flair = looks(count, generator, (0, 0.3, 0.2), [(256, 256)])
        t1 = looks(count, generator, (0, 0.3 + 0.04 * apart, 0.2), [(256, 256)])
        assert told(table(flair=flair, t1=t1)) == []


@pytest.mark.parametrize("count", [20, 300])
def test_two_cameras_for_two_eyes_are_no_exchange(count: int) -> None:
    """Sizes that are common in one column and rare in the other."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        left = looks(count, generator, (0.3, 0.3, 0.2), [PHOTO, CAMERA], 0.8)
        right = looks(count, generator, (0.3, 0.3, 0.2), [CAMERA, PHOTO], 0.8)
        assert told(table(left=left, right=right)) == []


@pytest.mark.parametrize("constant", [True, False])
def test_the_same_files_in_both_columns_are_no_exchange(constant: bool) -> None:
    column = np.tile(eyes(1)[0], (50, 1)) if constant else eyes(50)[0]
    assert told(table(cfp=column, oct=column)) == []


def test_small_tables_and_files_without_facts_are_passed_over() -> None:
    cfp, oct_ = eyes(19)
    swapped(cfp, oct_, [5])
    assert told(table(cfp=cfp, oct=oct_)) == []
    cfp, oct_ = eyes(40)
    swapped(cfp, oct_, [5, 6])
    files = table(cfp=cfp, oct=oct_)
    files[3].facts = None  # of row 5
    assert told(files) == [6]
    assert told([file for file in files if (file.modality, file.row) != ("oct", 6)]) == []


def test_one_file_in_the_wrong_column_is_no_exchange() -> None:
    cfp, oct_ = eyes(200)
    cfp[20] = oct_[21]
    assert told(table(cfp=cfp, oct=oct_)) == []


def test_what_varies_in_both_columns_says_little() -> None:
    """Images of all sizes, of which colour tells the modality."""
    generator = np.random.default_rng(0)
    cfp, oct_ = (looks(100, generator, (colour, 0.4, 0.3), [SCAN]) for colour in (0.4, 0))
    for column in (cfp, oct_):
        column[:, :2] *= np.exp(generator.normal(0, 1, (100, 2)))
    swapped(cfp, oct_, [7])
    assert told(table(cfp=cfp, oct=oct_)) == [7]


def test_of_three_modalities_the_two_are_named() -> None:
    cfp, oct_ = eyes(40)
    flair = looks(40, np.random.default_rng(1), (0, 0.6, 0.3), [(256, 256)])
    swapped(cfp, flair, [7])
    (found,) = compare_modalities(table(cfp=cfp, oct=oct_, flair=flair))
    assert found.row == 7 and found.text.startswith("cfp and flair look exchanged")


def test_several_files_of_a_cell_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cfp, oct_ = eyes(30)
    swapped(cfp, oct_, [5])
    assert told([*table(cfp=cfp, oct=oct_), *table(cfp=cfp)]) == [5]


def test_all_blocks_are_compared_and_many_findings_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanged, "_BLOCK", 7)
    monkeypatch.setattr(listed, "_SHOWN", 2)
    cfp, oct_ = eyes(100)
    swapped(cfp, oct_, [2, 9, 101])
    found = compare_modalities(table(cfp=cfp, oct=oct_))
    assert [str(fault) for fault in found][2:] == [
        "file: 3 rows have modalities that look exchanged; 2 of them are told"
    ]
    assert [fault.row for fault in found] == [2, 9, 0]


def test_a_manifest_with_exchanged_cells(tmp_path: Path) -> None:
    lines = ["id,cfp,oct"]
    generator = np.random.default_rng(0)
    for number in range(24):
        for name, shape in (("c", (24, 30, 3)), ("o", (20, 20))):
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{name}{number}.png")
        names = [f"c{number}.png", f"o{number}.png"]
        lines.append(",".join([str(number), *(names[::-1] if number == 10 else names)]))
    (tmp_path / "m.csv").write_text("\n".join(lines))
    config = DataConfig(modalities=("cfp", "oct"))
    warnings = read_manifest(tmp_path / "m.csv", config, classes=("x", "y"), labelled=False).warnings
    assert [str(warning) for warning in warnings] == [
        "row 12: cfp and oct look exchanged: 'o10.png' is like oct of other rows, 'c10.png' like cfp"
    ]
