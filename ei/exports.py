"""Files that people open: CSV in which no cell is run as a formula by a spreadsheet, HTML in which no text is a tag."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# A quotation mark that is there already counts as part of the cell, so that `plain` gives back what was written.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def escaped(cell: object) -> str:
    """The text of a cell, behind a ' if a spreadsheet would run it; numbers stay as they are.

    Args:
        cell: what ``str`` makes a text of.

    Example:
        >>> escaped("=1+1"), escaped("-0.25"), escaped("wet"), plain(escaped("=1+1"))
        ("'=1+1", '-0.25', 'wet', '=1+1')
    """
    text = str(cell)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def plain(cell: str) -> str:
    """What :func:`escaped` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_bytes(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> bytes:
    """A table in UTF-8 with commas, its header and every cell :func:`escaped`."""
    return "".join(f"{_line(cells)}\n" for cells in (columns, *rows)).encode()


def html_page(template: Path, content: Mapping[str, Any]) -> str:
    """A Jinja template filled with content, of which every text is escaped; a name that is missing is an error."""
    # Tables are also written where no page is.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template.name).render(content)


def _line(cells: Iterable[object]) -> str:
    text = io.StringIO()
    # The writer quotes a carriage return only if lines end with one, and a bare one would begin a row.
    csv.writer(text, lineterminator="\r\n").writerow(map(escaped, cells))
    return text.getvalue().removesuffix("\r\n")
