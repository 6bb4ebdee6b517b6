"""Which share of the work is whose. Imports no torch."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Shard:
    """Which of ``count`` processes this is, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "2/8", the second of eight.

        Raises:
            ValueError: it is something else.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"shard must be I/N with I from 1 to N, such as 2/8, got {text!r}")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
