"""The setting that says which numbers of a file are black and which are white. No torch, no numpy."""

import math
from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class Intensity:
    """How numbers become 0..1 where a file has more than 8 bits; 8-bit files are divided by 255 in any case.

    Args:
        rule: ``type``, by the file's number type or its own window; ``percentiles``, the 0.5th and 99.5th
            percentile of each file are black and white; ``window``, ``low`` and ``high`` are.
        low: what is black, in the units of the file (of a DICOM or NIfTI file: after its rescaling).
        high: what is white.

    Example:
        >>> Intensity.parse("-160:240")
        Intensity(rule='window', low=-160.0, high=240.0)
    """

    rule: Literal["type", "percentiles", "window"] = "type"
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """``type``, ``percentiles`` or ``LOW:HIGH``.

        Raises:
            ValueError: it is none of these, or LOW is not below HIGH.
        """
        if text in ("type", "percentiles"):
            return cls(rule=text)  # type: ignore[arg-type]
        low, _, high = text.partition(":")
        try:
            limits = float(low), float(high)
        except ValueError:
            limits = (math.nan, math.nan)
        # Comparisons with NaN are false.
        if not -math.inf < limits[0] < limits[1] < math.inf:
            raise ValueError(
                f"intensity must be type, percentiles, or LOW:HIGH (such as -160:240) with LOW below HIGH, got {text!r}"
            )
        return cls("window", *limits)


BY_TYPE = Intensity()
