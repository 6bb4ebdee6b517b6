"""Two runs side by side: what they share, and what keeps them from being compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ei.metrics.classification import paired_difference
from ei.report.against import compare_runs
from ei.runs.stored_logits import StoredLogits


def stored(samples: int = 12, seed: int = 0, **changes: Any) -> StoredLogits:
    """A run with three sources on test rows and then val rows, two rows per patient."""
    labels = np.arange(2 * samples) % 3
    logits = np.random.default_rng(seed).normal(size=(3, 2 * samples, 3)) + 1.5 * np.eye(3)[labels]
    values = {
        "classes": np.array(["a", "b", "c"]),
        "sources": np.array(["fused", "cfp", "oct"]),
        "ids": np.array([f"row {row}" for row in range(2 * samples)]),
        "patients": np.array([f"patient {row // 2}" for row in range(2 * samples)]),
        "splits": np.repeat(["test", "val"], samples),
        "labels": labels,
        "logits": logits.astype(np.float32),
    }
    return StoredLogits(**values | changes)


def written(folder: Path, content: StoredLogits) -> Path:
    folder.mkdir(parents=True)
    (folder / "logits.npz").write_bytes(content.as_bytes())
    return folder


def shuffled(content: StoredLogits) -> StoredLogits:
    order = np.random.default_rng(3).permutation(len(content.ids))
    names = ("ids", "patients", "splits", "labels")
    columns = {name: getattr(content, name)[order] for name in names}
    return StoredLogits(content.classes, content.sources, **columns, logits=content.logits[:, order])


def with_bit(archive: bytes, position: int) -> bytes:
    """One bit more in the first entry of a zip archive's directory."""
    changed = bytearray(archive)
    changed[archive.index(b"PK\x01\x02") + position] ^= 1
    return bytes(changed)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = stored()
    read = StoredLogits.read(written(tmp_path / "run", content) / "logits.npz")
    for name, array in vars(content).items():
        np.testing.assert_array_equal(getattr(read, name), array)
    assert content.as_bytes() == stored().as_bytes()


@pytest.mark.fault("logits.npz empty, cut, of other arrays or with pickled objects", "named, nothing is loaded")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 but no more"),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(with_bit(path.read_bytes(), 8)),  # "encrypted"
        lambda path: path.write_bytes(with_bit(path.read_bytes(), 10)),  # "compressed"
        lambda path: np.savez(path, ids=np.array(["a"])),
        lambda path: path.write_bytes(stored(ids=np.array(["too few"])).as_bytes()),
        lambda path: np.savez(path, **vars(stored()) | {"ids": np.array([{"code": 1}], dtype=object)}),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, spoil: Any) -> None:
    path = written(tmp_path / "run", stored()) / "logits.npz"
    spoil(path)
    with pytest.raises(ValueError, match=r"logits\.npz"):
        StoredLogits.read(path)


def test_each_split_and_source_that_both_have_is_compared(tmp_path: Path) -> None:
    ours, theirs = stored(seed=0), stored(seed=1, sources=np.array(["fused", "oct", "mri"]))
    found = compare_runs(written(tmp_path / "a", ours), written(tmp_path / "b", theirs), bootstrap=50, seed=7)
    assert {split: [row.source for row in rows] for split, rows in found.items()} == {
        "test": ["fused", "oct"],
        "val": ["fused", "oct"],
    }
    difference = found["test"][1]
    rows = np.argsort(ours.ids[:12])  # patients are drawn in the order of their names
    expected = paired_difference(
        ours.logits[2, rows],
        theirs.logits[1, rows],
        ours.labels[rows],
        ours.patients[rows].tolist(),
        ["a", "b", "c"],
        multi_label=False,
        bootstrap=50,
        seed=7,
    )
    assert (difference.samples, difference.patients) == (12, 6)
    assert difference.measures == expected
    right = ours.logits[2, rows].argmax(1) == ours.labels[rows]
    other = theirs.logits[1, rows].argmax(1) == ours.labels[rows]
    assert (difference.only_this, difference.only_other) == ((right & ~other).sum(), (other & ~right).sum())
    assert difference.mcnemar is None  # two rows per patient


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    runs = {"a": stored(seed=0), "b": stored(seed=1), "c": shuffled(stored(seed=1))}
    a, b, c = (written(tmp_path / name, content) for name, content in runs.items())
    assert compare_runs(a, b, bootstrap=50, seed=0) == compare_runs(a, c, bootstrap=50, seed=0)
    nothing = compare_runs(b, c, bootstrap=50, seed=0)["test"][0]
    assert nothing.measures["mAP"]["value"] == 0 and (nothing.only_this, nothing.only_other) == (0, 0)


def test_rows_without_a_modality_are_left_out_for_it(tmp_path: Path) -> None:
    logits = stored().logits.copy()
    logits[1, :4] = np.nan
    logits[2] = np.nan
    runs = written(tmp_path / "a", stored(logits=logits)), written(tmp_path / "b", stored(seed=1))
    found = compare_runs(*runs, bootstrap=0, seed=0)["test"]
    assert [(row.source, row.samples) for row in found] == [("fused", 12), ("cfp", 8)]
    other_way_round = compare_runs(*runs[::-1], bootstrap=0, seed=0)["test"]
    assert [(row.source, row.samples) for row in other_way_round] == [("fused", 12), ("cfp", 8)]


def test_mcnemar_where_every_patient_has_one_row(tmp_path: Path) -> None:
    changes = {"patients": np.array([f"patient {row}" for row in range(24)])}
    runs = written(tmp_path / "a", stored(**changes)), written(tmp_path / "b", stored(seed=1, **changes))
    fused = compare_runs(*runs, bootstrap=0, seed=0)["test"][0]
    assert fused.mcnemar is not None and 0 < fused.mcnemar <= 1


def test_several_labels_are_right_all_together(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (24, 3))
    good = np.where(labels, 1.0, -1.0)
    one_off = good.copy()
    one_off[:5, 0] *= -1
    runs = [
        written(tmp_path / name, stored(labels=labels, logits=np.stack([logits] * 3).astype(np.float32)))
        for name, logits in (("a", good), ("b", one_off))
    ]
    fused = compare_runs(*runs, bootstrap=0, seed=0)["test"][0]
    assert (fused.only_this, fused.only_other) == (5, 0)
    assert fused.measures["accuracy"]["value"] == pytest.approx(5 / 36)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": np.array(["a", "c", "b"])}, "the same classes in the same order .* has a, c, b"),
        ({"splits": np.repeat(["train"], 24)}, "not evaluated on a split of the same name"),
        ({"ids": np.array([f"eye {row}" for row in range(24)])}, "12 are only in the first and 12 .* such as 'row 0'"),
        (
            {"splits": np.array(["val"] + ["test"] * 11 + ["val"] * 12)},
            "the test rows .* 1 are only in the first and 0",
        ),
        ({"labels": np.array([2, *(np.arange(1, 24) % 3).tolist()])}, "the label of 1 samples, such as 'row 0'"),
        ({"patients": np.array(["x"] * 24)}, "the patient of 12 samples"),
        ({"labels": np.zeros((24, 3), int)}, "one label in one run and several in the other"),
    ],
)
@pytest.mark.fault("two runs with other classes, rows, labels or patients", "not compared, and why")
def test_runs_on_other_samples_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    runs = written(tmp_path / "a", stored()), written(tmp_path / "b", stored(**changes))
    with pytest.raises(ValueError, match=message):
        compare_runs(*runs, bootstrap=0, seed=0)


@pytest.mark.parametrize("name", ["a", "a/../a", "link"])
def test_a_run_is_not_compared_with_itself(tmp_path: Path, name: str) -> None:
    run = written(tmp_path / "a", stored())
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ValueError, match="are the same run, which does not differ from itself"):
        compare_runs(run, tmp_path / name, bootstrap=0, seed=0)


def test_a_run_without_logits_is_told_how_to_get_them(tmp_path: Path) -> None:
    run = written(tmp_path / "a", stored())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.yaml").touch()
    with pytest.raises(ValueError, match="b has no logits.npz; 'ei evaluate .*b' writes it"):
        compare_runs(run, tmp_path / "b", bootstrap=0, seed=0)
