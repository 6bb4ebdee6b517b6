"""A comparison as files: CSV for programs, HTML to read and print, LaTeX for a paper, JSON with everything, and text.

Names of methods, classes and modalities come from users: each format escapes them. Imports no torch.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ei.exports import csv_bytes, html_page
from ei.metrics.classification import OVERALL

Figure = Mapping[str, float | None]

UNKNOWN = "-"
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # \textquotedbl is unknown to LaTeX's default encoding.
    '"': r"\char34{}",
    # After the end of a row, these would be its optional argument or star.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
}


def write_comparison(content: Mapping[str, Any], out: Path) -> None:
    """Write comparison.csv, .html, .tex and .json into a folder, which is made if need be.

    Args:
        content: What :func:`ei.comparison.compare.compare` gives.
        out: The folder.
    """
    from mor.files import write_atomically  # here, because it brings torch with it

    payload = {
        "csv": csv_bytes(*_csv_table(content)),
        "html": _page(content).encode(),
        "tex": latex(content).encode(),
        "json": (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for ending, data in payload.items():
        write_atomically(out / f"comparison.{ending}", data)


def text_lines(content: Mapping[str, Any]) -> list[str]:
    """The main table for a terminal.

    The columns after the difference of the mAP to the first method say how likely so large a one is by the choice of
    patients (p), and how long one seed took.
    """
    rows = [["", "parameters", "seeds", "mAP", "mAUC", "mS2", "mAP - first", "p", "time"]]
    for method in content["methods"]:
        fused = method["sources"].get("fused")
        difference = (fused or {}).get("difference")
        rows.append(
            [
                method["name"],
                f"{method['parameters']:,}",
                str(len(method["seeds"])),
                *(_interval(fused["measures"][name]) if fused else UNKNOWN for name in OVERALL[:3]),
                signed(difference["mAP"]["value"]) if difference else UNKNOWN,
                number(difference["mAP"]["p"]) if difference else UNKNOWN,
                duration(method["cost"]["seconds"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [_headline(content), *lines, *_failures(content)]


def latex(content: Mapping[str, Any]) -> str:
    """Three tables of the package booktabs: the main one, the AP of each class, and each modality's own prediction.

    A table without columns, such as the last one where no method has such predictions, is left out.
    """
    main = [
        [
            latex_escaped(method["name"]),
            f"{method['parameters']:,}",
            str(len(method["seeds"])),
            *_tex_figures(method, "fused", "measures", OVERALL[:3]),
            *_tex_difference(method),
            latex_escaped(duration(method["cost"]["seconds"])),
        ]
        for method in content["methods"]
    ]
    header = ["Method", "Parameters", "Seeds", "mAP", "mAUC", "mS2", r"$\Delta$ mAP", "$p$", "Time"]
    classes = content["classes"]
    per_class = [
        [latex_escaped(method["name"]), *_tex_figures(method, "fused", "per_class", classes)]
        for method in content["methods"]
    ]
    tables = [
        f"% {_headline(content)}",
        "% Small: 95 % interval of the mean over seeds, and their standard deviation. Needs \\usepackage{booktabs}.",
        *(f"% {' '.join(line.split())}" for line in _failures(content)),
        _tabular(header, main, "lrrllllll"),
        "\n% AP of each class",
        _tabular(["Method", *map(latex_escaped, classes)], per_class, "l" * (1 + len(classes))),
    ]
    if modalities := _modalities(content):
        alone = [
            [
                latex_escaped(method["name"]),
                *(cell for name in modalities for cell in _tex_figures(method, name, "measures", ("mAP", "accuracy"))),
            ]
            for method in content["methods"]
        ]
        names = [f"{latex_escaped(name)}, {what}" for name in modalities.values() for what in ("mAP", "accuracy")]
        tables += ["\n% each modality's own prediction", _tabular(["Method", *names], alone, "l" * (1 + len(names)))]
    return "\n".join(tables) + "\n"


def latex_escaped(text: str) -> str:
    r"""Text as LaTeX shows it, on one line.

    >>> print(latex_escaped("50% <A&B> x_1 {2}"))
    50\% \textless{}A\&B\textgreater{} x\_1 \{2\}
    """
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def number(value: float | None) -> str:
    """Three digits, or a dash.

    >>> number(0.12345), number(None)
    ('0.123', '-')
    """
    return UNKNOWN if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """The same with its sign.

    >>> signed(0.12345)
    '+0.123'
    """
    return UNKNOWN if value is None else f"{value:+.3f}"


def duration(seconds: float | None) -> str:
    """
    >>> duration(5.25), duration(65), duration(3725)
    ('5.2 s', '1 min 05 s', '1 h 02 min')
    """
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def _headline(content: Mapping[str, Any]) -> str:
    folds = f" of {len(content['folds'])} folds" if content["folds"] else ""
    few = content["patients"] < 5 or not content["bootstrap"]
    intervals = "no intervals (fewer than 5 patients, or --bootstrap 0)" if few else "95 % intervals by patient"
    return f"{content['split']}{folds}: {content['samples']} samples, patients: {content['patients']}, {intervals}"


def _failures(content: Mapping[str, Any]) -> list[str]:
    return [
        f"failed: {', '.join(filter(None, (method['name'], cell['fold'], 'seed ' + str(cell['seed']))))}:"
        f" {cell['reason']}"
        for method in content["methods"]
        for cell in method["failed"]
    ]


def _interval(entry: Figure) -> str:
    bounds = "" if entry["low"] is None else f" [{number(entry['low'])}, {number(entry['high'])}]"
    return number(entry["value"]) + bounds


def _modalities(content: Mapping[str, Any]) -> dict[str, str]:
    """Those of which some method has a prediction of its own, with what heads its columns.

    That says so if figures are of fewer samples, because the others have no image of it.
    """
    sources = {name: each for method in content["methods"] for name, each in method["sources"].items()}
    return {
        name: name if each["samples"] == content["samples"] else f"{name} ({each['samples']} samples)"
        for name, each in sources.items()
        if name != "fused"
    }


def _csv_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = [dict(_csv_cells(method, content["classes"], _modalities(content))) for method in content["methods"]]
    return list(rows[0]), [["" if value is None else value for value in row.values()] for row in rows]


def _csv_cells(
    method: Mapping[str, Any], classes: Sequence[str], modalities: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    """Column and cell; the columns are the same for every method."""
    fused = method["sources"].get("fused", {})
    yield "method", method["name"]
    yield "parameters", method["parameters"]
    yield "seeds", len(method["seeds"])
    yield "failed", "; ".join(f"seed {cell['seed']} {cell['fold']}: {cell['reason']}" for cell in method["failed"])
    for group, names, prefix in (("measures", OVERALL, ""), ("per_class", classes, "AP:")):
        for name in names:
            entry = fused.get(group, {}).get(name, {})
            for key in ("value", "low", "high", "sd"):
                yield f"{prefix}{name}" + ("" if key == "value" else f"_{key}"), entry.get(key)
    for name in OVERALL:
        entry = (fused.get("difference") or {}).get(name, {})
        for key in ("value", "low", "high", "p"):
            yield f"difference_{name}" + ("" if key == "value" else f"_{key}"), entry.get(key)
    for modality in modalities:
        for name in OVERALL:
            entry = method["sources"].get(modality, {}).get("measures", {}).get(name, {})
            yield f"{name}:{modality}", entry.get("value")
    yield from method["cost"].items()


def _tex_figures(method: Mapping[str, Any], source: str, group: str, names: Sequence[str]) -> list[str]:
    found = method["sources"].get(source)
    return [_tex_figure(found[group][name], number) if found else "--" for name in names]


def _tex_difference(method: Mapping[str, Any]) -> list[str]:
    difference = method["sources"].get("fused", {}).get("difference")
    if not difference:
        return ["--", "--"]
    p = difference["mAP"]["p"]
    return [_tex_figure(difference["mAP"], signed), "--" if p is None else f"${p:.3f}$"]


def _tex_figure(entry: Figure, shown: Any) -> str:
    if entry["value"] is None:
        return "--"
    small = [] if entry["low"] is None else [f"[${shown(entry['low'])}$, ${shown(entry['high'])}$]"]
    small += [] if entry.get("sd") is None else [rf"$\pm {number(entry['sd'])}$"]
    return f"${shown(entry['value'])}$" + (rf" {{\scriptsize {' '.join(small)}}}" if small else "")


def _tabular(header: Sequence[str], rows: Sequence[Sequence[str]], columns: str) -> str:
    lines = [rf"{' & '.join(cells)} \\" for cells in (header, *rows)]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _page(content: Mapping[str, Any]) -> str:
    helpers = {"number": number, "signed": signed, "duration": duration}
    names = {"headline": _headline(content), "modalities": _modalities(content), "overall": OVERALL}
    return html_page(Path(__file__).parent / "page.html.jinja", dict(content) | names | helpers)
