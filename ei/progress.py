"""What a run tells while it works: progress bars on a terminal, plain lines elsewhere."""

import os
import select
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

_console = Console(stderr=False, highlight=False, soft_wrap=True)


def is_speaker() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one; the others are silent."""
    return int(os.environ.get("RANK", "0")) == 0


def is_read() -> bool:
    """Whether somebody may still read what is printed, as far as one can know: false behind a 'head' that has ended."""
    try:
        poll = select.poll()
        for stream in (sys.stdout, sys.stderr):
            poll.register(stream.fileno(), 0)
        return not poll.poll(0)
    except (AttributeError, OSError, ValueError):  # no poll on Windows; no file behind the stream
        return False


def say(line: str = "") -> None:
    """Print a line that stays, in log files too."""
    if is_speaker():
        _console.print(line, markup=False)


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Iterate with a bar that vanishes when it is done; silent where nobody watches."""
    if not (sys.stdout.isatty() and is_speaker()):
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True) as bars:
        task = bars.add_task(description, total=total)
        for item in items:
            yield item
            bars.advance(task)
