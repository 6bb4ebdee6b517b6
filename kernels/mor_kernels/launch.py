"""Launch a kernel that was launched before for half of the host's time that Triton takes.

Triton looks at every argument and option of every launch: 12 microseconds of a slow core, four times in a layer's
forward and backward, which decides where a card has little to do. What its choice depends on is told from the tensors'
and numbers' kinds; the program it chose for them first is launched from then on, in 6.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_programs: dict[tuple, tuple[Any, tuple]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor | None], numbers: Sequence[int], **constants: Any
) -> None:
    """``kernel[grid](*tensors, *numbers, **constants)``.

    The kernel takes tensors, then numbers, then constants; ``constants`` are also Triton's options. The first tensor is
    on the current device. Triton's debugging knobs are heeded as they stand at the first launch of a kind.
    """
    key = (
        kernel.fn,
        tensors[0].device,  # type: ignore[union-attr]
        *[None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors],
        *[(n == 1, n % 16 == 0, n >= 2**31) for n in numbers],
        *constants,
        *constants.values(),
    )
    known = _programs.get(key)
    if known is not None:
        program, values = known
        program[(*grid, 1, 1)[:3]](*tensors, *numbers, *values)
        return
    program = kernel[grid](*tensors, *numbers, **constants)
    if program is not None:  # Triton's interpreter has none
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _programs[key] = program, tuple(constants[name] for name in names)
