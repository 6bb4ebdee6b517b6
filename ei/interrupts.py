"""Ctrl-C and SIGTERM while training: save first, then stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Training was asked to stop, and has saved where it stands."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number  # as a shell reports it


class ElsewhereError(Exception):
    """Another of the processes that train together has failed, and says why."""


@contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Within the context, the first signal is only noted, and a second one acts as it always did, or stops.

    Gives a function that says which signal has come, if any. Outside the main thread, where Python gives no signals,
    nothing is changed.
    """
    come: list[int] = []
    before: dict[signal.Signals, Any] = {}
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        come.append(number)
        for each, handler in before.items():
            # What is said below is true also where a shell has started this in the background, with Ctrl-C ignored.
            signal.signal(each, signal.default_int_handler if handler is signal.SIG_IGN else handler)
        if os.getpid() == owner:  # and not a process that loads images, which a terminal's Ctrl-C reaches, too
            # Not printed: the signal may have come in the middle of a print.
            os.write(2, b"\nstopping after this step, once it is saved; a second time stops at once\n")

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            before[number] = signal.signal(number, note)
    try:
        yield lambda: come[0] if come else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
