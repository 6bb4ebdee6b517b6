"""Cells that a spreadsheet would run never begin a cell, and nothing else is changed."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ei.exports import csv_bytes, escaped, plain


@pytest.mark.fault("a cell that a spreadsheet would run", "a text in every table that is written")
@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd|' /C calc'!A0", "@SUM(A1)", "\tx", "\rx", "\nx", "-", "-1_000"])
def test_a_formula_becomes_a_text(text: str) -> None:
    assert escaped(text) == f"'{text}"


@pytest.mark.parametrize("value", ["-0.25", "+1", "-1e-05", "-.5", "-3.", "0.5", -0.25, -3, "", "p-1", " =1", "a=b"])
def test_numbers_and_harmless_texts_stay(value: object) -> None:
    assert escaped(value) == str(value)


CELLS = st.text(st.sampled_from("=+-@\t\r\n'1.e,;\"a "), max_size=6) | st.text(max_size=6)


@given(CELLS)
def test_what_was_escaped_comes_back(text: str) -> None:
    assert plain(escaped(text)) == text


@given(st.lists(CELLS, min_size=2, max_size=2))
def test_a_table_is_read_as_it_was_written(cells: list[str]) -> None:
    text = csv_bytes(["=column", "b"], [cells, [-1.5, "x"]]).decode()
    header, first, second = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert (header, second) == (["'=column", "b"], ["-1.5", "x"])
    assert [plain(cell) for cell in first] == cells
