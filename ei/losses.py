"""The loss, term by term. B batch, M modalities, C classes."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ei.models.output import Output


def loss_terms(
    output: Output, labels: Tensor, *, aux_weight: float, gate_weight: float, gate_prior: int | None
) -> dict[str, Tensor]:
    """The terms of the loss, each without its weight, and their weighted sum under 'total'.

        fused      CE(logits)
        modality   sum_m CE(logits_m)
        auxiliary  sum_m CE(aux_logits_m)
        gate       mean -log w_{m*}
        total      fused + modality + aux_weight * auxiliary + gate_weight * gate

    A part that the output does not have gives no term. With a single modality the answer is that
    modality's, so there is a 'modality' term and no 'fused' one: nothing counts twice. For float labels CE is
    the binary cross-entropy with logits. Arithmetic is in fp32 or wider, whatever the logits are.

    Args:
        output: Of any model.
        labels: (B,) int64, or (B, C) float with several labels per sample.
        aux_weight: Weight of 'auxiliary'; the paper's is 0.3.
        gate_weight: Weight of 'gate'; the paper's is 0.1.
        gate_prior: Column m* of ``modality_weights`` of the best modality; None: no 'gate' term.

    Raises:
        ValueError: labels do not fit the logits, or the prior is no column.

    Source: arXiv 2603.17514, section 3.5, equations 5 to 8.

    >>> weights = torch.tensor([[0.5, 0.5]])
    >>> halves = Output(torch.zeros(1, 2), {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, {}, weights)
    >>> terms = loss_terms(halves, torch.tensor([0]), aux_weight=0.3, gate_weight=0.1, gate_prior=1)
    >>> {name: round(float(term), 4) for name, term in terms.items()}
    {'fused': 0.6931, 'modality': 1.3863, 'gate': 0.6931, 'total': 2.1488}
    """
    terms: dict[str, Tensor] = {}
    if len(output.modality_logits) != 1:
        terms["fused"] = classification_loss(output.logits, labels)
    if output.modality_logits:
        terms["modality"] = _summed(output.modality_logits.values(), labels)
    if output.aux_logits:
        terms["auxiliary"] = _summed(output.aux_logits.values(), labels)
    if output.modality_weights is not None and gate_prior is not None:
        terms["gate"] = gate_loss(output.modality_weights, gate_prior)
    weights = {"auxiliary": aux_weight, "gate": gate_weight}
    total = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
    return terms | {"total": total}


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of (B,) integer labels, or mean binary cross-entropy of (B, C) float ones.

    >>> round(float(classification_loss(torch.zeros(1, 4), torch.tensor([2]))), 4)
    1.3863
    """
    several = labels.is_floating_point()
    expected = logits.shape if several else logits.shape[:1]
    if labels.shape != expected:
        raise ValueError(
            f"labels must be {tuple(expected)} for logits {tuple(logits.shape)}, got {tuple(labels.shape)}"
        )
    logits = _at_least_fp32(logits)
    if several:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def gate_loss(modality_weights: Tensor, gate_prior: int) -> Tensor:
    """Mean of -log w over the batch, for the weight in column ``gate_prior`` of (B, M).

    >>> round(float(gate_loss(torch.tensor([[0.25, 0.75]]), 0)), 4)
    1.3863
    """
    modalities = modality_weights.shape[1]
    if not 0 <= gate_prior < modalities:
        raise ValueError(f"gate_prior must be one of the columns 0..{modalities - 1}, got {gate_prior}")
    weight = _at_least_fp32(modality_weights[:, gate_prior])
    # A softmax can underflow to zero, whose logarithm would make the whole loss infinite.
    return -weight.clamp_min(torch.finfo(weight.dtype).tiny).log().mean()


def _summed(each: Iterable[Tensor], labels: Tensor) -> Tensor:
    return torch.stack([classification_loss(logits, labels) for logits in each]).sum()


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
