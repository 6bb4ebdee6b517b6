"""Time on a GPU: calls taking turns, on a cold L2 cache, as CUDA graphs or with what it takes to launch them.

For `python -m mor_kernels.tune` and for the benchmarks; the operators import nothing from here.
"""

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from mor_kernels.tables import SHIPPED, VARIABLE, file_name

Name = TypeVar("Name", bound=Hashable)

WARM_UP = 3
FLUSH_BYTES = 2**28  # several times any L2 cache


@contextmanager
def side_stream() -> Iterator[None]:
    """Everything on one stream that is not the default one, for `captured`.

    Autograd runs a backward on the streams of its forward and of its leaves, and a capture must not meet another one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """The work that `function` launches as one CUDA graph; returns its replay. To be called on a `side_stream`.

    A few calls first compile and allocate what the capture could not.
    """
    for _ in range(WARM_UP):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    return graph.replay


def in_turn(
    calls: dict[Name, Callable[[], object]], seconds: float, *, launches_count: bool, device: str, least: int = 10
) -> dict[Name, list[float]]:
    """Microseconds of each call, round after round, in an order shuffled anew for every round.

    Args:
        calls: what to time, by name.
        seconds: how long to go on, warm-up not counted; at least `least` rounds are made.
        launches_count: whether the clock also runs while Python launches: the card then waits idle before each call.
            Otherwise calls are queued behind each other, as replays of CUDA graphs should be.
        device: "cuda"; on the "cpu" the time is the wall's and the cache is left as it is.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for function in calls.values():
        for _ in range(WARM_UP if device == "cuda" else 1):
            function()
    shuffle, order = random.Random(0).shuffle, list(calls)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None
    until, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < until:
        shuffle(order)
        rounds += 1
        if flush is None:
            for name in order:
                start = time.perf_counter()
                calls[name]()
                times[name].append(1e6 * (time.perf_counter() - start))
            continue
        marks = []
        for name in order:
            flush.zero_()
            if launches_count:
                torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            calls[name]()
            end.record()
            marks.append((name, begin, end))
        torch.cuda.synchronize()
        for name, begin, end in marks:
            times[name].append(1e3 * begin.elapsed_time(end))
    return times


def quantiles(values: Sequence[float]) -> list[float]:
    """[median, 20 % quantile, 80 % quantile]

    >>> quantiles([1.0, 2.0, 3.0, 4.0, 11.0])
    [3.0, 1.8, 5.4]
    """
    ordered = torch.tensor(values, dtype=torch.float64)
    return [round(q, 4) for q in torch.quantile(ordered, ordered.new_tensor([0.5, 0.2, 0.8])).tolist()]


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes of GPU memory at the worst moment of a call, above what was allocated before it."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class StandInDriver:
    """An sm_90 card, as far as Triton's launch code asks: for what can be counted and timed without one."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def table_in_use(gpu: str) -> str | None:
    """Name and fingerprint of the file whose tiles and forms are taken on a card of this name; None: the defaults."""
    own = os.environ.get(VARIABLE)
    path = Path(own) if own else SHIPPED / file_name(gpu)
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" if path.exists() else None


def git_state(folders: Sequence[Path]) -> dict[str, Any]:
    """The commit of the packages in `folders`, and whether they, or anything beside them, differ from that commit.

    Where there is no repository the environment variable GIT_COMMIT is taken at its word.
    """
    # An installed copy is in no commit, though it may lie below a repository.
    if any(_git(folder, "ls-files", "--error-unmatch", "__init__.py") is None for folder in folders):
        return {"commit": os.environ.get("GIT_COMMIT", "unknown"), "code_changed": None, "tree_changed": None}
    return {
        "commit": _git(folders[0], "rev-parse", "HEAD"),
        "code_changed": any(_git(folder, "status", "--porcelain", "--", ".") for folder in folders),
        "tree_changed": bool(_git(folders[0], "status", "--porcelain")),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
