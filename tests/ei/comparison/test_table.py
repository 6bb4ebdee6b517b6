"""The table of a comparison against plain loops over the same rows, and what other patients or cells do to it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ei.comparison.table import Failure, Result, tabulate
from ei.metrics.resampling import patient_weights
from ei.runs.stored_logits import StoredLogits

CLASSES = ["a", "b", "c"]
COST = {"seconds": 2.0, "images_per_second": 50.0, "memory_gib": None, "epochs": 3}


def stored(seed: int, signal: float = 1.0, samples: int = 24, fold: str = "", **changes: Any) -> StoredLogits:
    """Logits of 'fused' and 'cfp' on test rows, two of each patient; more signal makes them better."""
    labels = np.arange(samples) % 3
    logits = np.random.default_rng(seed).normal(size=(2, samples, 3)) + signal * np.eye(3)[labels]
    values = {
        "classes": np.array(CLASSES),
        "sources": np.array(["fused", "cfp"]),
        "ids": np.array([f"{fold}{row:03d}" for row in range(samples)]),
        "patients": np.array([f"{fold}patient {row // 2}" for row in range(samples)]),
        "splits": np.repeat("test", samples),
        "labels": labels,
        "logits": logits.astype(np.float32),
    }
    return StoredLogits(**values | changes)


def result(method: str, seed: int, logits: StoredLogits, fold: str = "", **cost: Any) -> Result:
    return Result(method, seed, fold, logits, COST | cost)


def table(results: list[Result], failures: list[Failure] | None = None, **changes: Any) -> dict[str, Any]:
    names = list(dict.fromkeys(each.method for each in [*results, *(failures or [])]))
    settings = {"folds": [""], "bootstrap": 200, "seed": 0} | changes
    return tabulate(results, failures or [], dict.fromkeys(names, 7), **settings)


def fused(content: dict[str, Any], method: int) -> dict[str, Any]:
    return content["methods"][method]["sources"]["fused"]


def mean_ap_and_auc(content: StoredLogits, rows: np.ndarray) -> tuple[float, float]:
    """Independent of ours: the rows, repeated, given to scikit-learn."""
    pairs = [
        (measure(content.labels[rows] == index, content.logits[0, rows, index].astype(float)))
        for measure in (average_precision_score, roc_auc_score)
        for index in range(3)
    ]
    return float(np.mean(pairs[:3])), float(np.mean(pairs[3:]))


def test_figures_are_those_of_plain_loops() -> None:
    ours = {"first": [stored(0), stored(1)], "other": [stored(9, 2), stored(10, 2)]}
    results = [result(name, seed, logits) for name, each in ours.items() for seed, logits in enumerate(each)]
    content = table(results, seed=5, bootstrap=60)
    weights = next(patient_weights(stored(0).patients.tolist(), 60, seed=5))
    draws = [np.repeat(np.arange(24), draw.astype(int)) for draw in weights]
    assert all(set(stored(0).labels[rows]) == {0, 1, 2} for rows in draws)
    drawn = {}
    for position, (name, each) in enumerate(ours.items()):
        values = np.array([mean_ap_and_auc(logits, np.arange(24)) for logits in each])  # (seeds, 2)
        drawn[name] = np.mean([[mean_ap_and_auc(logits, rows) for rows in draws] for logits in each], axis=0)
        for column, measure in enumerate(("mAP", "mAUC")):
            entry = fused(content, position)["measures"][measure]
            low, high = np.percentile(drawn[name][:, column], [2.5, 97.5])
            sd = abs(values[0, column] - values[1, column]) / np.sqrt(2)
            expected = {"value": values[:, column].mean(), "low": low, "high": high, "sd": sd}
            assert entry == pytest.approx(expected)
    difference = fused(content, 1)["difference"]["mAP"]
    first, other = (fused(content, position)["measures"]["mAP"]["value"] for position in (0, 1))
    differences = (drawn["other"] - drawn["first"])[:, 0]
    low, high = np.percentile(differences, [2.5, 97.5])
    p = min(1.0, 2 * ((differences <= 0).sum() + 1) / 61)
    assert difference == pytest.approx({"value": other - first, "low": low, "high": high, "p": p})
    assert other > first and fused(content, 0)["difference"] is None


def test_one_seed_is_what_its_run_says(finished: Path) -> None:
    """Values and intervals, of every source, as metrics.json has them."""
    logits = StoredLogits.read(finished / "logits.npz").of_split("test")
    content = table([result("ei", 0, logits)], bootstrap=50)
    metrics = json.loads((finished / "metrics.json").read_text())["splits"]["test"]
    assert content["samples"] == metrics["fused"]["samples"] == 9
    for source, entry in content["methods"][0]["sources"].items():
        expected = metrics["fused"] if source == "fused" else metrics["modalities"][source]
        for name, measured in entry["measures"].items():
            assert measured == pytest.approx(expected["overall"][name] | {"sd": None})
        for name, measured in entry["per_class"].items():
            assert measured == pytest.approx(expected["per_class"][name]["AP"] | {"sd": None})


def test_the_same_predictions_do_not_differ() -> None:
    content = table([result(method, seed, stored(seed)) for method in ("first", "same") for seed in (0, 1, 2)])
    for entry in fused(content, 1)["difference"].values():
        assert entry == {"value": 0, "low": 0, "high": 0, "p": 1}


def test_a_better_method_is_better() -> None:
    results = [result("first", seed, stored(seed, 0.2, 60)) for seed in (0, 1)]
    results += [result("better", seed, stored(seed + 5, 3, 60)) for seed in (0, 1)]
    results += [result("like", seed, stored(seed + 9, 0.2, 60)) for seed in (0, 1)]
    better, like = (fused(table(results), position)["difference"]["mAP"] for position in (1, 2))
    assert better["low"] > 0 and better["p"] < 0.02
    assert like["low"] < 0 < like["high"] and like["p"] > 0.1


def test_the_difference_is_of_the_seeds_that_both_have() -> None:
    results = [result("first", seed, stored(seed)) for seed in (0, 1)] + [result("other", 1, stored(7))]
    content = table(results, [Failure("other", 0, "", "boom")])
    alone = table([result("first", 1, stored(1)), result("other", 1, stored(7))])
    assert fused(content, 1)["difference"] == fused(alone, 1)["difference"]
    assert content["methods"][1]["seeds"] == [1]
    assert content["methods"][1]["failed"] == [{"seed": 0, "fold": "", "reason": "boom"}]
    assert fused(content, 1)["measures"]["mAP"]["sd"] is None


def test_a_method_that_failed_is_a_row_without_figures() -> None:
    content = table([result("other", 0, stored(0))], [Failure("first", 0, "", "boom")])
    names = [method["name"] for method in content["methods"]]
    assert (names, content["reference"]) == (["other", "first"], "other")
    assert content["methods"][1]["sources"] == {} and content["methods"][1]["cost"]["seconds"] is None


def test_without_the_first_method_there_is_no_difference() -> None:
    content = tabulate([result("other", 0, stored(0))], [], {"first": 1, "other": 2}, folds=[""], bootstrap=9, seed=0)
    assert content["reference"] == "first" and content["methods"][0]["sources"] == {}
    assert fused(content, 1)["difference"] is None and fused(content, 1)["measures"]["mAP"]["value"] is not None


def test_a_method_without_predictions_of_modalities() -> None:
    whole = stored(0)
    bare = stored(1, sources=np.array(["fused"]), logits=whole.logits[:1])
    content = table([result("whole", 0, whole), result("bare", 0, bare)])
    assert [list(method["sources"]) for method in content["methods"]] == [["fused", "cfp"], ["fused"]]


def test_rows_without_a_modality_are_left_out_for_it() -> None:
    logits = stored(0).logits.copy()
    logits[1, :4] = np.nan
    content = table([result("first", 0, stored(0, logits=logits)), result("other", 0, stored(1))])
    cfp = [method["sources"]["cfp"] for method in content["methods"]]
    assert (cfp[0]["samples"], cfp[1]["samples"]) == (20, 24)
    assert cfp[1]["difference"] is None  # not on the same rows
    assert fused(content, 1)["difference"] is not None


def test_folds_are_one_set_of_rows() -> None:
    sizes = {"x": 12, "y": 10, "z": 14}
    folds = [stored(seed, samples=sizes[name], fold=name) for seed, name in enumerate(sizes)]
    content = table(
        [result("first", 0, logits, fold) for fold, logits in zip("xyz", folds, strict=True)]
        + [result("first", 1, folds[0], "x")],
        folds=list("xyz"),
    )
    labels, logits = np.concatenate([fold.labels for fold in folds]), np.concatenate([fold.logits[0] for fold in folds])
    aps = [average_precision_score(labels == index, logits[:, index]) for index in range(3)]
    assert fused(content, 0)["measures"]["mAP"]["value"] == pytest.approx(np.mean(aps))
    assert (content["samples"], content["patients"], content["methods"][0]["seeds"]) == (36, 18, [0])
    assert content["methods"][0]["cost"]["seconds"] == 6  # of three folds
    one = content["cells"][1]["sources"]["fused"]["mAP"]
    rows = np.arange(10)
    assert one == pytest.approx(mean_ap_and_auc(folds[1], rows)[0])


def test_cost_is_that_of_a_seed() -> None:
    seconds = [result("first", seed, stored(seed), seconds=seed + 1.0, memory_gib=seed + 2.0) for seed in (0, 1)]
    cost = table(seconds)["methods"][0]["cost"]
    assert cost == {"seconds": 1.5, "images_per_second": 50, "memory_gib": 3, "epochs": 3}


@pytest.mark.fault("cells of a comparison that were evaluated on other rows or labels", "no table, and why")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ids": np.array([f"eye {row:02d}" for row in range(24)])},
            "first, seed 0 and other, seed 1 are not the same",
        ),
        ({"labels": (np.arange(24) + 1) % 3}, "differ in the label of 24 samples"),
        ({"patients": np.array(["x"] * 24)}, "differ in the patient"),
        ({"classes": np.array(["a", "c", "b"])}, "first, seed 0 and other, seed 1 must have the same classes"),
    ],
)
def test_cells_on_other_rows_are_not_compared(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table([result("first", 0, stored(0)), result("other", 1, stored(1, **changes))])


def test_nothing_finished_is_no_table() -> None:
    with pytest.raises(ValueError, match="no cell of the comparison is finished"):
        table([], [Failure("first", 0, "", "boom")])
