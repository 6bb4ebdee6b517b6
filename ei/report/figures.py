"""The pictures of a report: numbers in, one self-contained SVG and its description out.

Every picture is small enough for a phone and says in words (``alt``) what it shows. Colours are Okabe and
Ito's, told apart with every kind of colour vision; lines differ in dashes too, for print in grey.
"""

import base64
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

BLACK, COLOURS = "#1b1f24", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dashed", "dashdot", "dotted")
SHADES = "Blues"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6e7781",
    "axes.labelcolor": BLACK,
    "text.color": BLACK,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "svg.fonttype": "none",  # the reader's own fonts have letters that matplotlib's lack
    "svg.hashsalt": "report",  # the same run gives the same bytes
    "text.parse_math": False,  # a dollar sign in a class name is a dollar sign
}
WIDTH = 4.5  # inches


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and what it shows in words."""

    source: str
    alt: str


def loss_curves(epochs: Sequence[Mapping[str, Any]], stage: str) -> Picture | None:
    """The total loss and its terms by epoch; None if no epoch has a loss."""
    return _by_epoch(epochs, "loss", "total", stage, "Loss")


def validation_curves(epochs: Sequence[Mapping[str, Any]], stage: str) -> Picture | None:
    """The validation figures by epoch, mAP first; None if no epoch was validated."""
    return _by_epoch(epochs, "val", "mAP", stage, "Validation")


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], split: str) -> Picture:
    """Counts of true (rows) by predicted class (columns), shaded by their share of the row."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(WIDTH, 1.6 + 0.42 * len(classes))
    with _picture(side, 0.85 * side) as (figure, axes):
        image = _shaded(axes, shares, [[str(count) for count in row] for row in counts], classes, classes)
        axes.set(xlabel="Predicted class", ylabel="True class")
        figure.colorbar(image, ax=axes, label="Share of the true class")
        right = f"{np.trace(counts)} of {counts.sum()} samples of {split} are on the diagonal"
        alt = f"Confusion matrix, rows true and columns predicted class: {right}."
        return _as_picture(figure, alt)


def roc(name: str, curves: Mapping[str, Mapping[str, Any]], areas: Mapping[str, float | None]) -> Picture:
    """ROC curves of one class, one per source of predictions."""
    lines = {source: (curve["roc"]["fpr"], curve["roc"]["tpr"]) for source, curve in curves.items()}
    with _picture(WIDTH, 3.4) as (figure, axes):
        axes.plot([0, 1], [0, 1], color="#8c959f", linewidth=1, linestyle="dotted")
        _curve_lines(axes, lines, areas, "AUC", "default")
        axes.set(xlabel="False positive rate (1 - specificity)", ylabel="True positive rate (sensitivity)")
        return _as_picture(figure, f"ROC curves of class {name}: {_listed(areas, 'AUC')}.")


def precision_recall(
    name: str, curves: Mapping[str, Mapping[str, Any]], areas: Mapping[str, float | None], prevalence: float
) -> Picture:
    """Precision-recall curves of one class, one per source, over the line of a random order."""
    lines = {source: (curve["pr"]["recall"], curve["pr"]["precision"]) for source, curve in curves.items()}
    with _picture(WIDTH, 3.4) as (figure, axes):
        axes.axhline(prevalence, color="#8c959f", linewidth=1, linestyle="dotted")
        _curve_lines(axes, lines, areas, "AP", "steps-pre")
        axes.set(xlabel="Recall (sensitivity)", ylabel="Precision")
        alt = f"Precision-recall curves of class {name}: {_listed(areas, 'AP')}; share of the class"
        return _as_picture(figure, f"{alt} {prevalence:.2f}.")


def reliability(
    name: str, bins: Sequence[Mapping[str, float]], without: Sequence[Mapping[str, float]] | None = None
) -> Picture:
    """The share that came true by the probability that was given, with intervals, over bars that count samples.

    Args:
        name: what was predicted, or by whom.
        bins: as :func:`ei.metrics.calibration.reliability` gives them.
        without: those of the same predictions without a temperature.
    """
    with _picture(WIDTH, 3.9, heights=(3, 1)) as (figure, (axes, bars)):
        axes.plot([0, 1], [0, 1], color="#8c959f", linewidth=1, linestyle="dotted")
        given, shares, low, high = (
            np.array([each[key] for each in bins]) for key in ("probability", "share", "low", "high")
        )
        # Rounding may put an end of an interval past its share.
        errors = np.maximum([shares - low, high - shares], 0)
        points = axes.errorbar(given, shares, errors, color=BLACK, fmt="o", markersize=5, elinewidth=1, zorder=3)
        if without:
            columns = ([each[key] for each in without] for key in ("probability", "share"))
            (hollow,) = axes.plot(*columns, "s", color=COLOURS[1], markersize=5, markerfacecolor="white")
            _legend(axes, {"with temperature": points, "without": hollow}, above=True)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="Share that came true")
        widths = [each["end"] - each["start"] for each in bins]
        style: dict[str, Any] = {"width": widths, "align": "edge", "color": COLOURS[0], "edgecolor": "white"}
        bars.bar([each["start"] for each in bins], [each["count"] for each in bins], **style)
        bars.set(xlim=(-0.02, 1.02), yscale="log", xlabel="Probability", ylabel="Samples")
        bars.set_ylim(bottom=0.5)
        bars.yaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        bars.yaxis.set_minor_locator(NullLocator())
        told = "; ".join(f"{each['probability']:.2f} and {each['share']:.2f} of {each['count']}" for each in bins)
        return _as_picture(figure, f"Reliability of {name}: mean probability and share that came true by bin: {told}.")


def weight_bars(groups: Mapping[str, Mapping[str, float]], split: str) -> Picture:
    """Mean modality weights as one full bar per group of samples."""
    modalities, handles = list(next(iter(groups.values()))), {}
    names = [_wrapped(name, 22) for name in groups]
    with _picture(WIDTH, 1.2 + 0.14 * sum(2 + name.count("\n") for name in names)) as (figure, axes):
        left = np.zeros(len(groups))
        for modality, colour in zip(modalities, _cycled(COLOURS, len(modalities)), strict=True):
            widths = np.array([weights[modality] for weights in groups.values()])
            bars = axes.barh(range(len(groups)), widths, left=left, color=colour, edgecolor="white")
            texts = [f"{width:.2f}" if width > 0.09 else "" for width in widths]
            axes.bar_label(bars, texts, label_type="center", color=_readable_on(colour))
            left += widths
            handles[modality] = bars
        axes.set_yticks(range(len(groups)), names)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="Mean modality weight")
        _legend(axes, handles, above=True)
        described = "; ".join(f"{name}: {_listed(weights)}" for name, weights in groups.items())
        return _as_picture(figure, f"Mean modality weights on {split}. {described}.")


def gate_map(part: str, layers: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> Picture:
    """Mean gates, layers by experts, bypass last where there is one; shades run from 0 to 1 in every map."""
    bypassed = any(layer.get("bypass") is not None for layer in layers)
    shares = np.full((len(layers), len(experts) + bypassed), np.nan)
    for row, layer in zip(shares, layers, strict=True):
        row[: len(layer["gates"])] = layer["gates"]
        if layer.get("bypass") is not None:
            row[-1] = layer["bypass"]
    columns = [*experts, *(["bypass"] if bypassed else [])]
    with _picture(WIDTH, 1.2 + 0.21 * len(layers)) as (figure, axes):
        texts = [[f"{share:.2f}" for share in row] for row in shares]
        image = _shaded(axes, shares, texts, [layer["layer"] for layer in layers], columns)
        axes.set(xlabel="Expert", ylabel="Layer")
        figure.colorbar(image, ax=axes, label="Mean gate", aspect=30)
        means = dict(zip(columns, np.nanmean(shares, axis=0).tolist(), strict=True))
        return _as_picture(figure, f"Mean gates of {len(layers)} layers of {part}; on average {_listed(means)}.")


@contextmanager
def _picture(width: float, height: float, heights: Sequence[float] = (1,)) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes; several, one above the other, where ``heights`` has several."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Only the widths of such letters are guessed: the reader's own fonts draw them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(len(heights), height_ratios=heights)


def _as_picture(figure: Figure, alt: str) -> Picture:
    stream = BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return Picture("data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii"), alt)


def _by_epoch(epochs: Sequence[Mapping[str, Any]], key: str, main: str, stage: str, label: str) -> Picture | None:
    points: dict[str, list[tuple[int, float]]] = {main: []}
    for epoch in epochs:
        for name, value in (epoch[key] or {}).items():
            if value is not None:
                points.setdefault(name, []).append((epoch["epoch"], value))
    names = [name for name, pairs in points.items() if pairs]
    if not names:
        return None
    handles = {}
    with _picture(WIDTH, 3.0) as (figure, axes):
        for name, colour, dash in _styled(names):
            style: dict[str, Any] = {"linestyle": dash, "marker": ".", "markersize": 4, **_weight(colour)}
            (handles[name],) = axes.plot(*zip(*points[name], strict=True), color=colour, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="Epoch", ylabel=label)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        _legend(axes, handles, above=True)
        (start, first), (end, last) = points[names[0]][0], points[names[0]][-1]
        change = f"{names[0]} {first:.2f} at epoch {start}, {last:.2f} at epoch {end}"
        return _as_picture(figure, f"{label} of {stage} by epoch: {change}.")


def _curve_lines(
    axes: Axes,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    areas: Mapping[str, float | None],
    area: str,
    drawstyle: Any,
) -> None:
    handles = {}
    for source, colour, dash in _styled(list(lines)):
        style: dict[str, Any] = {"linestyle": dash, "drawstyle": drawstyle, **_weight(colour)}
        name = f"{source}, {area} {_short(areas[source])}"
        (handles[name],) = axes.plot(*lines[source], color=colour, **style)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    _legend(axes, handles, above=False)


def _shaded(
    axes: Axes,
    shares: NDArray[Any],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> Any:
    """Squares shaded from 0 to 1 with a text in each, and the names of rows and columns."""
    image = axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            colour = "white" if share > 0.55 else BLACK
            axes.text(column, row, texts[row][column], ha="center", va="center", color=colour, fontsize=8)
    upright = len(columns) * max(len(name) for name in columns) > 40
    axes.set_xticks(range(len(columns)), [_wrapped(name, 24) for name in columns], rotation=90 if upright else 0)
    axes.set_yticks(range(len(rows)), [_wrapped(name, 24) for name in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _styled(names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, colour and dashes; the first name is the main one, black and solid."""
    colours = [BLACK, *_cycled(COLOURS, len(names) - 1)]
    dashes = ["solid", *_cycled(DASHES[1:], len(names) - 1)]
    return zip(names, colours, dashes, strict=True)


def _weight(colour: str) -> dict[str, float]:
    """The main line is thicker, and lies over the others."""
    return {"linewidth": 2.2, "zorder": 3} if colour == BLACK else {"linewidth": 1.3}


def _cycled(items: Sequence[str], length: int) -> list[str]:
    return [items[index % len(items)] for index in range(length)]


def _legend(axes: Axes, handles: Mapping[str, Any], *, above: bool) -> None:
    labels = [_wrapped(name, 24) for name in handles]
    options: dict[str, Any] = {"loc": "best"}
    if above:
        options = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": min(4, len(labels))}
        options |= {"handlelength": 1.6, "columnspacing": 1.2, "borderpad": 0.2}
    axes.legend(list(handles.values()), labels, fontsize=8, **options)


def _readable_on(colour: str) -> str:
    brightness = np.dot(to_rgb(colour), (0.299, 0.587, 0.114))
    return BLACK if brightness > 0.55 else "white"


def _wrapped(name: str, width: int) -> str:
    """Over several lines, and without the control characters that an SVG may not hold."""
    return textwrap.fill(re.sub(r"[\x00-\x1f\x7f]", " ", name), width)


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _listed(values: Mapping[str, float | None], what: str = "") -> str:
    return ", ".join(f"{name} {what} {_short(value)}".replace("  ", " ") for name, value in values.items())
