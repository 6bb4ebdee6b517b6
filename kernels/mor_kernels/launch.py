"""Launch a kernel as before without deciding everything anew.

Triton looks at every argument and option of every launch; grid and numbers follow from sizes that are the same from
step to step. Four times in a layer's forward and backward, that decides where a card has little to do. So each kernel
makes one `Launch` for each set of sizes, and keeps it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

#: Keeps what a function makes for the same arguments: sizes, tiles, and the device, for each has programs of its own.
#: A model needs a few dozen for each number of rows.
decided_once = lru_cache(maxsize=4096)


class Launch:
    """``kernel[grid](*tensors, *numbers, **constants)``, to be called with the tensors.

    The kernel takes tensors, then numbers, then constants; ``constants`` are also Triton's options. All calls are made
    on one device, the current one then. Triton finds the program at the first call; which one it is depends on the
    tensors' dtypes and on whether they begin at a multiple of 16 bytes, beside what is fixed here. Triton's debugging
    knobs are heeded as they stand at that call.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], **constants: Any) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self._known: dict[tuple, tuple[Callable[..., None], tuple]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        kinds = tuple([None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
        known = self._known.get(kinds)
        if known is not None:
            run, rest = known
            run(*tensors, *rest)
            return
        program = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if program is not None:  # Triton's interpreter has none
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            rest = (*self.numbers, *[self.constants[name] for name in names])
            self._known[kinds] = program[(*self.grid, 1, 1)[:3]], rest
