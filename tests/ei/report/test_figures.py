"""Pictures: what they say, that they parse, and that odd names do not break them."""

import base64
from xml.etree import ElementTree

import pytest

from ei.metrics.calibration import reliability
from ei.report import figures
from ei.report.figures import Picture


def drawn_text(picture: Picture) -> str:
    drawing = base64.b64decode(picture.source.removeprefix("data:image/svg+xml;base64,"))
    return "".join(ElementTree.fromstring(drawing).itertext())


def record(epoch: int, loss: dict | None = None, val: dict | None = None) -> dict:
    return {"epoch": epoch, "loss": loss, "val": val}


def test_curves_by_epoch_tell_first_and_last_and_leave_out_gaps() -> None:
    epochs = [record(0), record(1, {"gate": None, "total": 2.0}), record(2, {"gate": 1.0, "total": 0.5})]
    picture = figures.loss_curves(epochs, "Stage 2")
    assert picture is not None
    assert picture.alt == "Loss of Stage 2 by epoch: total 2.00 at epoch 1, 0.50 at epoch 2."
    assert "gate" in drawn_text(picture)


@pytest.mark.parametrize("val", [None, {}, {"mAP": None, "accuracy": None}])
def test_no_picture_where_nothing_was_recorded(val: dict | None) -> None:
    assert figures.validation_curves([record(0, val=val)], "Stage 2") is None
    assert figures.loss_curves([], "Stage 2") is None


def test_a_figure_that_was_never_defined_is_not_drawn() -> None:
    picture = figures.validation_curves([record(0, val={"mAP": None, "accuracy": 0.5})], "Stage 1, oct")
    assert picture is not None
    assert "accuracy 0.50 at epoch 0" in picture.alt and "mAP" not in drawn_text(picture)


def test_confusion_counts_the_diagonal_and_survives_an_empty_row() -> None:
    picture = figures.confusion([[7, 1], [0, 0]], ["a", "b"], "test")
    assert "7 of 8 samples of test are on the diagonal" in picture.alt


def test_reliability_tells_its_bins_and_draws_both_sets_of_points() -> None:
    bins = reliability([0.1, 0.9, 0.95], [False, True, False])
    told = "0.10 and 0.00 of 1; 0.90 and 1.00 of 1; 0.95 and 0.00 of 1."
    plain = figures.reliability("oct", bins)
    assert plain.alt == f"Reliability of oct: mean probability and share that came true by bin: {told}"
    assert "without" not in drawn_text(plain) and "Probability" in drawn_text(plain)
    both = figures.reliability("oct", bins, reliability([0.5], [True]))
    assert both.alt == plain.alt and "without" in drawn_text(both)


def test_counts_in_a_reliability_plot_are_plain_numbers() -> None:
    """Of a logarithmic axis: no formulas, which the style leaves as they are written."""
    text = drawn_text(figures.reliability("oct", reliability([0.1] * 2000 + [0.9], [False] * 2000 + [True])))
    assert "100" in text and "$" not in text and "mathdefault" not in text


def test_layers_may_differ_in_experts_and_bypass() -> None:
    layers = [
        {"layer": "fc1", "gates": [0.25, 0.5], "bypass": 0.25},
        {"layer": "fc2", "gates": [0.75], "bypass": None},
    ]
    picture = figures.gate_map("primary/oct", layers, ["rank 2", "rank 4"])
    assert picture.alt.endswith("on average rank 2 0.50, rank 4 0.50, bypass 0.25.")
    assert "nan" not in drawn_text(picture)


@pytest.mark.parametrize("name", ["$x$ \\frac", "_hidden", "a\x00b\x1b", "正常", "<a & b>", " ", "x" * 90])
def test_any_name_can_be_drawn(name: str) -> None:
    groups = {name: {name: 0.25, "other": 0.75}}
    text = drawn_text(figures.weight_bars(groups, "test"))
    assert "0.25" in text
    expected = "".join(letter for letter in name if letter.isprintable() and not letter.isspace())
    assert "".join(text.split()).count(expected) >= 2  # its bar, and the legend


def test_the_same_numbers_give_the_same_bytes() -> None:
    groups = {"all": {"cfp": 0.25, "oct": 0.75}}
    assert figures.weight_bars(groups, "test") == figures.weight_bars(groups, "test")


def test_more_lines_than_colours_are_all_drawn() -> None:
    sources = [f"modality {number}" for number in range(11)]
    curve = {"roc": {"fpr": [0, 1], "tpr": [0, 1]}, "pr": {"recall": [0, 1], "precision": [1, 0.5]}}
    areas: dict[str, float | None] = dict.fromkeys(sources, 0.5)
    for picture in (
        figures.roc("a", dict.fromkeys(sources, curve), areas),
        figures.precision_recall("a", dict.fromkeys(sources, curve), areas, 0.5),
    ):
        assert all(source in drawn_text(picture) for source in sources)
