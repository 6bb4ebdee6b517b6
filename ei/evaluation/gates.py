"""What the routers of a model do while it predicts, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from ei.models import Encoder
from mor import MoRLinear, record_gates
from mor.gates import GateRecord, GateSummary


@contextmanager
def recorded_gates(model: nn.Module) -> Iterator[Mapping[str, GateRecord]]:
    """Records of all routers by the ViT they belong to, such as "primary/oct"; empty if there are none.

    Of a ViT in both roles there is one record, "primary+auxiliary/oct".
    """
    roles: dict[tuple[nn.Module, str], list[str]] = {}
    for name, branch in model.named_modules():
        if isinstance(branch, Encoder) and _has_router(branch):
            roles.setdefault((branch.backbone.vit, branch.modality), []).append(name.split(".")[0] or "unimodal")
    with ExitStack() as stack:
        yield {
            f"{'+'.join(each)}/{modality}": stack.enter_context(record_gates(vit))
            for (vit, modality), each in roles.items()
        }


def _has_router(module: nn.Module) -> bool:
    return any(isinstance(layer, MoRLinear) and layer.mor_router is not None for layer in module.modules())


def gate_rows(each: Sequence[Mapping[str, GateSummary]]) -> list[dict[str, Any]]:
    """A dict per layer, from what each process saw of it."""
    layers = dict.fromkeys(layer for summaries in each for layer in summaries)
    return [{"layer": layer} | asdict(_joined([s[layer] for s in each if layer in s])) for layer in layers]


def _joined(parts: Sequence[GateSummary]) -> GateSummary:
    """The summary of all tokens together; all of its figures are means over tokens."""
    tokens = [part.tokens for part in parts]

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=tokens)) if len(parts) > 1 else values[0]

    return GateSummary(
        gates=tuple(mean(values) for values in zip(*(part.gates for part in parts), strict=True)),
        bypass=None if parts[0].bypass is None else mean([part.bypass or 0.0 for part in parts]),
        entropy=mean([part.entropy for part in parts]),
        effective_rank=mean([part.effective_rank for part in parts]),
        tokens=sum(tokens),
    )
