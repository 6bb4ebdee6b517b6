"""What a run tells while it works: progress bars on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

_console = Console(stderr=False, highlight=False, soft_wrap=True)


def say(line: str = "") -> None:
    """Print a line that stays, in log files too."""
    _console.print(line, markup=False)


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Iterate with a bar that vanishes when it is done; silent where nobody watches."""
    if not sys.stdout.isatty():
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True) as bars:
        task = bars.add_task(description, total=total)
        for item in items:
            yield item
            bars.advance(task)
