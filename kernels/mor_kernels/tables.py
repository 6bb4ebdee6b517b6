"""What was measured to win on a card: tiles and forms, from JSON files beside this one and from the user's own.

For each card the tiles are, each on top of the one before: `blocks.DEFAULTS`, which suit any card; the file that
ships for a card of this name, `tables/<name>.json`; the file that the environment variable MOR_KERNELS_TABLE names.
A card without a file gets the defaults and the form "branch". Tables are read once per card and never time anything;
`python -m mor_kernels.tune` writes them.

    {"gpu": "NVIDIA H200",
     "tiles": [{"kernel": "branch", "elements": "16-bit", "below_rows": 4096,
                "rows": 16, "inner": 256, "columns": 256, "warps": 4, "stages": 3}],
     "forms": [{"dtype": "bfloat16", "K": 768, "O": 3072, "below_rows": null,
                "forward": "tail", "backward": "branch", "torch_wins": false}]}

`below_rows` is one of `blocks.ROW_LIMITS`, or null for more rows than the last. "torch_wins": true says that torch's
own operators, without a fused form, were faster.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mor_kernels.blocks import KERNELS, KINDS, ROW_BUCKETS, Blocks, TileKey, default_tiles, kind, row_bucket

SHIPPED = Path(__file__).parent / "tables"
VARIABLE = "MOR_KERNELS_TABLE"
FUSED_FORMS = ("branch", "tail")
SIDES = (16, 32, 64, 128, 256, 512)  # a tile's sides; the sums over rows rely on powers of two
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

FormKey = tuple[torch.dtype, int, int, int | None]  # dtype, K, O, row bucket


class Forms(NamedTuple):
    """The faster fused form of each direction, and whether torch's own operators beat both together."""

    forward: str = "branch"
    backward: str = "branch"
    torch_wins: bool = False


@dataclass(frozen=True)
class Table:
    """Tiles by (kernel, kind, row bucket) and forms by (dtype, K, O, row bucket) for one card."""

    tiles: Mapping[TileKey, Blocks]
    forms: Mapping[FormKey, Forms]

    def with_entries_of(self, other: "Table") -> "Table":
        return Table({**self.tiles, **other.tiles}, {**self.forms, **other.forms})


def choose(kernel: str, x: Tensor, rank_columns: int = 0) -> Blocks:
    """The tile for this kernel on x (T, ...)'s card, dtype and number of rows.

    A wide rank side (over 32 columns) halves the tile's other two sides, or it would not fit the smaller chips.
    """
    blocks = table_of(x.device).tiles[kernel, kind(x.dtype), row_bucket(x.shape[0])]
    if rank_columns > 32:
        blocks = blocks._replace(inner=max(16, blocks.inner // 2), columns=max(16, blocks.columns // 2))
    return blocks


def choose_forms(x: Tensor, columns: int) -> Forms:
    """The forms measured to win for x (T, K) and O columns on x's card; elsewhere "branch", which leaves the large
    GEMM to the library."""
    key = (x.dtype, x.shape[1], columns, row_bucket(x.shape[0]))
    return table_of(x.device).forms.get(key, Forms())


def prefers_library(device: torch.device, dtype: torch.dtype, K: int, O: int, rows: int) -> bool:
    """Whether torch's own operators were measured to be faster here than either fused form.

    For a caller that has both. Costs a look into a dictionary, never touches the device, and is a constant of each row
    bucket to torch.compile. False where nothing was measured.

    >>> prefers_library(torch.device("cpu"), torch.float32, 768, 3072, 1576)
    False
    """
    return _prefers_library(device, dtype, K, O, row_bucket(rows))


@torch.compiler.assume_constant_result
def _prefers_library(device: torch.device, dtype: torch.dtype, K: int, O: int, bucket: int | None) -> bool:
    forms = table_of(device).forms.get((dtype, K, O, bucket))
    return forms is not None and forms.torch_wins


@cache
def table_of(device: torch.device) -> Table:
    """Everything known about this device, read at its first use.

    Raises:
        ValueError: a file that MOR_KERNELS_TABLE names, or one that ships, is damaged or for another card.
    """
    name, capability = card(device)
    table = Table(default_tiles(capability), {})
    shipped = SHIPPED / file_name(name)
    if shipped.exists():
        table = table.with_entries_of(read_table(shipped, name))
    if own := os.environ.get(VARIABLE):
        table = table.with_entries_of(read_table(Path(own), name))
    return table


def card(device: torch.device) -> tuple[str, tuple[int, int] | None]:
    """Name and compute capability of a card; what is no card has no capability."""
    if device.type != "cuda":
        return device.type, None
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def file_name(gpu: str) -> str:
    """
    >>> file_name("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3.json'
    """
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def read_table(path: Path, gpu: str) -> Table:
    """The entries of one file for the card named `gpu`.

    Raises:
        ValueError: it cannot be read, is for another card, or one of its fields is wrong; the message names both.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the table of tiles {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the table of tiles {path} is no JSON: {error}") from error
    try:
        return _parse(content, gpu)
    except _Wrong as error:
        raise ValueError(f"the table of tiles {path}: {error}") from None


class _Wrong(Exception):
    """A field that is not what it must be."""

    def __init__(self, field: str, need: str, value: object) -> None:
        super().__init__(f"{field} must be {need}, got {value!r}")


class _Entry:
    """One object of the file. Every field that is read is remembered, so that a misspelt one can be told."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise _Wrong(where or "the whole file", "an object", value)
        self.value, self.prefix, self.known = value, f"{where}." if where else "", set[str]()

    def get(self, field: str, default: object = None) -> Any:
        self.known.add(field)
        return self.value.get(field, default)

    def one_of(self, field: str, allowed: Sequence[object], default: object = None) -> Any:
        value = self.get(field, default)
        # 4096.0 and true are equal to 4096 and 1, but they are no tile's side.
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise _Wrong(self.prefix + field, f"one of {', '.join(map(json.dumps, allowed))}", value)
        return value

    def items(self, field: str) -> list["_Entry"]:
        values = self.get(field, [])
        if not isinstance(values, list):
            raise _Wrong(self.prefix + field, "a list", values)
        return [_Entry(value, f"{self.prefix}{field}[{i}]") for i, value in enumerate(values)]

    def nothing_else(self) -> None:
        for field in self.value.keys() - self.known:
            raise _Wrong(self.prefix + field, f"absent, or one of {', '.join(sorted(self.known))}", self.value[field])


def _parse(content: object, gpu: str) -> Table:
    file = _Entry(content, "")
    if file.get("dry_run"):
        raise _Wrong("dry_run", "absent, since the interpreter's times mean nothing", True)
    if file.get("gpu") != gpu:
        raise _Wrong("gpu", f"{gpu!r}, the card at hand", file.get("gpu"))
    table = Table(dict(map(_tile, file.items("tiles"))), dict(map(_forms, file.items("forms"))))
    for evidence in ("made", "measured"):
        file.get(evidence)
    file.nothing_else()
    return table


def _tile(entry: _Entry) -> tuple[TileKey, Blocks]:
    kernel = entry.one_of("kernel", KERNELS)
    key = (kernel, entry.one_of("elements", KINDS), entry.one_of("below_rows", ROW_BUCKETS))
    tile = Blocks(
        rows=entry.one_of("rows", SIDES) if kernel != "weight_grad" else entry.one_of("rows", [0], default=0),
        inner=entry.one_of("inner", SIDES),
        columns=entry.one_of("columns", SIDES) if kernel != "shrink" else entry.one_of("columns", [0], default=0),
        warps=entry.one_of("warps", (1, 2, 4, 8, 16)),
        stages=entry.one_of("stages", range(1, 9)),
        persistent=entry.one_of("persistent", (False, True) if kernel == "matmul_tail" else (False,), default=False),
    )
    entry.nothing_else()
    return key, tile


def _forms(entry: _Entry) -> tuple[FormKey, Forms]:
    for size in ("K", "O"):
        if type(entry.get(size)) is not int or entry.get(size) < 1:
            raise _Wrong(entry.prefix + size, "a positive integer", entry.get(size))
    dtype = DTYPES[entry.one_of("dtype", list(DTYPES))]
    key = (dtype, entry.get("K"), entry.get("O"), entry.one_of("below_rows", ROW_BUCKETS))
    forms = Forms(
        entry.one_of("forward", FUSED_FORMS),
        entry.one_of("backward", FUSED_FORMS),
        entry.one_of("torch_wins", (False, True), default=False),
    )
    entry.nothing_else()
    return key, forms
