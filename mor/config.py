"""What a Mixture-of-Ranks layer looks like: ranks, their scaling, the router's bypass."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, eq=False)
class MoRConfig:
    """Settings of a Mixture-of-Ranks layer; immutable, and checked when made.

    One class covers the method, its ablations and its relatives: equal ranks without bypass are LoRAMoE,
    a single rank without bypass is LoRA (and has no router at all).

    Args:
        ranks: Rank of each expert.
        alphas: Numerator of each expert's scaling ``alpha / rank``; None means twice the rank each.
        bypass: The router has one more output that belongs to no expert, so that it can decline to adapt.
        dropout: Probability with which inputs of the experts (not of the router) are zeroed in training.

    Raises:
        ValueError, TypeError: a field does not make sense; the message names it.

    Source: arXiv 2603.17514, section 3.4.

    >>> MoRConfig().scaling
    (2.0, 2.0, 2.0)
    >>> MoRConfig(ranks=(4,), bypass=False).router_outputs  # plain LoRA
    0
    """

    ranks: tuple[int, ...] = (2, 4, 8)
    alphas: tuple[float, ...] | None = None
    bypass: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        ranks = _as_tuple("ranks", self.ranks, int)
        if not ranks or min(ranks) < 1:
            raise ValueError(f"ranks must be one or more positive integers, got {self.ranks!r}")
        alphas = None if self.alphas is None else _as_tuple("alphas", self.alphas, float)
        if alphas is not None and len(alphas) != len(ranks):
            raise ValueError(f"alphas must have one value per rank, got {len(alphas)} for {len(ranks)} ranks")
        if alphas is not None and not all(0 < alpha < float("inf") for alpha in alphas):
            raise ValueError(f"alphas must be positive and finite, got {self.alphas!r}")
        if not isinstance(self.bypass, bool):
            raise TypeError(f"bypass must be True or False, got {self.bypass!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise TypeError(f"dropout must be a number, got {self.dropout!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        # Frozen is for callers; here the checked form takes the place of what was given.
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "alphas", alphas)
        object.__setattr__(self, "dropout", float(self.dropout))
        _ = self.scaling  # kept from now on: torch.compile cannot fill the cache

    @cached_property  # read in every forward of every layer; an older pickle may lack it
    def scaling(self) -> tuple[float, ...]:
        """alpha / rank of each expert."""
        # Left out, alphas follow the ranks even if those are replaced later.
        alphas = self.alphas or tuple(2.0 * rank for rank in self.ranks)
        return tuple(alpha / rank for alpha, rank in zip(alphas, self.ranks, strict=True))

    @property
    def router_outputs(self) -> int:
        """Number of gates: one per expert and one for the bypass; 0 if there is nothing to weigh."""
        gates = len(self.ranks) + self.bypass
        return gates if gates > 1 else 0

    def __eq__(self, other: object) -> bool:
        """Settings are equal if layers made with them compute the same."""
        return isinstance(other, MoRConfig) and self._effect == other._effect

    def __hash__(self) -> int:
        return hash(self._effect)

    @property
    def _effect(self) -> tuple[Any, ...]:
        return (self.ranks, self.scaling, self.bypass, self.dropout)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; an unknown field is a ValueError."""
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown field of MoRConfig: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


def make_config(config: Any, config_fields: Mapping[str, Any]) -> MoRConfig:
    """A config, or the default one, with some fields replaced.

    Raises:
        TypeError: ``config`` is something else, or there is no such field.
    """
    known = [item.name for item in fields(MoRConfig)]
    if config is not None and not isinstance(config, MoRConfig):
        hint = ", whose .mor is one" if isinstance(getattr(config, "mor", None), MoRConfig) else ""
        got = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise TypeError(
            f"config must be a mor.MoRConfig, or be left out and its fields given as keywords ({', '.join(known)}),"
            f" got {got}{hint}"
        )
    if unknown := [f"{name}={value!r}" for name, value in config_fields.items() if name not in known]:
        raise TypeError(
            f"unknown keyword {', '.join(unknown)}; the fields of mor.MoRConfig are {', '.join(known)}, with one rank"
            " (and alpha) per expert, such as ranks=(2, 4, 8)"
        )
    return replace(config or MoRConfig(), **config_fields)


def _as_tuple(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}")
    number = Integral if kind is int else Real
    if any(isinstance(value, bool) or not isinstance(value, number) for value in values):
        raise TypeError(f"{name} must hold only {'integers' if kind is int else 'numbers'}, got {values!r}")
    return tuple(kind(value) for value in values)
