"""The files of a comparison: every name escaped as its format wants it, and the same figures in all of them."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ei.comparison.files import latex, latex_escaped, text_lines, write_comparison
from ei.exports import plain

NASTY = "=<b>&50% x_1 {2} $3 #4 ~^\\ \"q\" 'r' [*|"


def entry(value: float | None, **more: float | None) -> dict[str, float | None]:
    return {"value": value, "low": None if value is None else value - 0.1, "high": value and value + 0.1, **more}


def source(value: float, classes: list[str], difference: float | None) -> dict[str, Any]:
    names = ("mAP", "mAUC", "mS2", "accuracy")
    return {
        "samples": 9,
        "measures": {name: entry(value, sd=0.01) for name in names},
        "per_class": {name: entry(None if index else value, sd=None) for index, name in enumerate(classes)},
        "difference": None if difference is None else {name: entry(difference, p=0.04) for name in names},
    }


@pytest.fixture
def content() -> dict[str, Any]:
    """Three methods: one with predictions of modalities, one without, one that failed."""
    classes = [NASTY, "@dry"]
    nothing = {"seconds": None, "images_per_second": None, "memory_gib": None, "epochs": None}
    methods = [
        {"sources": {"fused": source(0.5, classes, None), f"cfp {NASTY}": source(0.4, classes, None)}, "failed": []},
        {"sources": {"fused": source(0.7, classes, 0.2)}, "failed": []},
        {"sources": {}, "failed": [{"seed": 1, "fold": f"a {NASTY}", "reason": f"boom {NASTY}"}]},
    ]
    costs = [{"seconds": 65.0, "images_per_second": 50.0, "memory_gib": 1.5, "epochs": 3.0}, nothing, nothing]
    names = ["ei", NASTY, "+late"]
    return {
        "split": "test",
        "bootstrap": 50,
        "folds": ["a", "b"],
        "protocol": {"data": {"labels": [NASTY]}},
        "classes": classes,
        "multi_label": False,
        "samples": 9,
        "patients": 6,
        "reference": "ei",
        "cells": [],
        "methods": [
            method
            | {"name": name, "parameters": 1234567, "seeds": [0], "cost": cost, "modality": None}
            | {"settings": {"gate_prior": NASTY}}
            for name, method, cost in zip(names, methods, costs, strict=True)
        ],
    }


@pytest.fixture
def written(content: dict[str, Any], tmp_path: Path) -> Path:
    write_comparison(content, tmp_path / "new" / "out")
    return tmp_path / "new" / "out"


class Page(HTMLParser):
    """Tags and texts, as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_without_anything_but_itself(written: Path) -> None:
    text = (written / "comparison.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "b" not in page.tags and "script" not in page.tags
    assert {"src", "href"}.isdisjoint(page.attributes)
    assert page.texts.count(NASTY) >= 5  # rows of several tables, a class
    assert any(f"boom {NASTY}" in part for part in page.texts)
    assert "0.700" in text and "+0.200" in text and "p 0.040" in text and "1 min 05 s" in text
    assert "@media print" in text


def test_csv_is_read_as_it_was_written(written: Path, content: dict[str, Any]) -> None:
    text = (written / "comparison.csv").read_text(encoding="utf-8")
    cells = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert not any(cell[:1] in "=+@" for row in cells for cell in row if cell)
    header, *rows = [[plain(cell) for cell in row] for row in cells]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["method"] for row in table] == ["ei", NASTY, "+late"]
    assert float(table[1]["mAP"]) == 0.7 and float(table[1]["difference_mAP_p"]) == 0.04
    assert float(table[0][f"mAP:cfp {NASTY}"]) == 0.4 and table[1][f"mAP:cfp {NASTY}"] == ""
    assert float(table[0][f"AP:{NASTY}"]) == 0.5 and table[0]["AP:@dry"] == ""
    assert table[2]["mAP"] == "" and "boom" in table[2]["failed"]
    assert table[0]["seconds"] == "65.0"


def test_json_is_everything(written: Path, content: dict[str, Any]) -> None:
    assert json.loads((written / "comparison.json").read_text()) == json.loads(json.dumps(content))


def unescaped(cell: str) -> str:
    """The text of a LaTeX cell; fails on a special character that is not escaped."""
    words = {r"\textbackslash": "\\", r"\textasciitilde": "~", r"\textasciicircum": "^", r"\textless": "<"}
    words |= {r"\textgreater": ">", r"\textbar": "|", r"\char34": '"'}
    pattern = re.compile(r"(\\[a-z]+(?:34)?)\{\}|\\([&%$#_{}])|\{([\[\]*])\}|([^\\&%$#_{}~^<>|\[\]*\"])")
    parts, position = [], 0
    while position < len(cell):
        match = pattern.match(cell, position)
        assert match, f"not escaped: {cell[position:]}"
        word, *others = match.groups()
        parts.append(words[word] if word else next(filter(None, others)))
        position = match.end()
    return "".join(parts)


def test_latex_of_names(content: dict[str, Any]) -> None:
    assert unescaped(latex_escaped(NASTY)) == NASTY
    assert unescaped(latex_escaped("two\nlines\\\\")) == "two lines\\\\"
    with pytest.raises(AssertionError):
        unescaped("50% of x")


def test_latex_tables_have_as_many_cells_as_columns(content: dict[str, Any]) -> None:
    tables = re.findall(r"\\begin\{tabular\}\{(\w+)\}\n\\toprule\n(.*?)\\bottomrule", latex(content), flags=re.S)
    assert [len(columns) for columns, _ in tables] == [9, 3, 3]
    for columns, body in tables:
        rows = [line for line in body.splitlines() if line != r"\midrule"]
        assert len(rows) == 4
        for row in rows:
            cells = re.split(r"(?<!\\)&", row.removesuffix(r" \\"))
            assert len(cells) == len(columns)
    names = [unescaped(row.split(" & $")[0].split(" & --")[0].split(" & 1,")[0]) for row in rows[1:]]
    assert names == ["ei", NASTY, "+late"]


def test_latex_says_what_failed_and_shows_signs_as_signs(content: dict[str, Any]) -> None:
    content["methods"][2]["failed"][0]["reason"] = "boom\n\\input{x}"
    text = latex(content)
    assert f"\n% failed: +late, a {NASTY}, seed 1: boom \\input{{x}}\n" in text
    assert r"$+0.200$ {\scriptsize [$+0.100$, $+0.300$]}" in text
    assert r"$0.700$ {\scriptsize [$0.600$, $0.800$] $\pm 0.010$}" in text


def test_figures_of_fewer_samples_say_so(content: dict[str, Any]) -> None:
    """A modality's own prediction is of the samples that have it."""
    content["methods"][0]["sources"] = {"fused": source(0.5, content["classes"], None)}
    content["methods"][0]["sources"] |= {name: source(0.4, content["classes"], None) for name in ("cfp", "oct")}
    content["methods"][0]["sources"]["oct"]["samples"] = 7
    assert "Method & cfp, mAP & cfp, accuracy & oct (7 samples), mAP & oct (7 samples), accuracy" in latex(content)


def test_the_text(content: dict[str, Any]) -> None:
    lines = text_lines(content)
    assert lines[0] == "test of 2 folds: 9 samples, patients: 6, 95 % intervals by patient"
    assert "0.500 [0.400, 0.600]" in lines[2] and "1 min 05 s" in lines[2]
    assert "+0.200" in lines[3] and "0.040" in lines[3]
    assert lines[-1] == f"failed: +late, a {NASTY}, seed 1: boom {NASTY}"


def test_no_method_with_predictions_of_modalities(content: dict[str, Any]) -> None:
    del content["methods"][0]
    assert latex(content).count(r"\begin{tabular}") == 2
