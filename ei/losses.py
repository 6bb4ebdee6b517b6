"""The loss, term by term. B batch, M modalities, C classes.

A mean is taken over all samples of a step that have what it is about, however many modalities lack an image, and
however the step is cut into batches and dealt out to processes: :class:`Shares` says what each sample counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ei.data.sample import Batch
from ei.models.output import Output


@dataclass(frozen=True)
class Shares:
    """What each sample of a batch counts in the means of the loss; over all samples of a step they sum to one."""

    whole: Tensor  # (B,)
    modality: Mapping[str, Tensor]  # modality -> (B,), zero where a sample has no image of it


def shares(batches: Sequence[Batch], total: Callable[[Tensor], Tensor] = lambda counts: counts) -> list[Shares]:
    """The shares of the samples of each of a step's batches.

    Args:
        batches: Of this process, with the same modalities.
        total: From counts in this process to those in all of them.

    >>> batch = Batch({}, present={"oct": torch.tensor([[True], [False], [True], [True]])}, ids=list("abcd"))
    >>> one, = shares([batch])
    >>> one.whole.tolist(), [round(value, 3) for value in one.modality["oct"].tolist()]
    ([0.25, 0.25, 0.25, 0.25], [0.333, 0.0, 0.333, 0.333])
    """
    modalities = list(batches[0].present)
    # (batch, kind of mean) -> (B,): one where a sample is part of it
    parts = [[batch.has(modality).float() * batch.counts for modality in modalities] for batch in batches]
    wholes = [torch.full_like(part[0], float(batch.counts)) for batch, part in zip(batches, parts, strict=True)]
    counted = [torch.stack([whole, *part]).sum(1) for whole, part in zip(wholes, parts, strict=True)]
    whole_count, *counts = total(torch.stack(counted).sum(0)).clamp_min(1).unbind()
    return [
        Shares(
            whole / whole_count,
            {name: have / count for name, have, count in zip(modalities, part, counts, strict=True)},
        )
        for whole, part in zip(wholes, parts, strict=True)
    ]


def loss_terms(
    output: Output,
    labels: Tensor,
    *,
    aux_weight: float,
    gate_weight: float,
    gate_prior: str | None,
    shares: Shares | None = None,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of the loss, each without its weight, and their weighted sum under 'total'.

        fused      CE(logits)
        modality   sum_m CE(logits_m)
        auxiliary  sum_m CE(aux_logits_m)
        gate       mean -log w_{m*}
        total      fused + modality + aux_weight * auxiliary + gate_weight * gate

    Penalties of the output are terms of their own name: their means over the samples, with the weights they have.
    A part that the output does not have gives no term. With a single modality the answer is that
    modality's, so there is a 'modality' term and no 'fused' one: nothing counts twice. For float labels CE is
    the binary cross-entropy with logits. Arithmetic is in fp32 or wider, whatever the logits are.

    Args:
        output: Of any model.
        labels: (B,) int64, or (B, C) float with several labels per sample.
        aux_weight: Weight of 'auxiliary'; the paper's is 0.3.
        gate_weight: Weight of 'gate'; the paper's is 0.1.
        gate_prior: The best modality m*; None: no 'gate' term.
        shares: What each sample counts; None: every sample has every modality, and all count the same. Terms of
            the batches and processes of a step add up.
        class_weights: (C,), see :func:`classification_loss`.

    Raises:
        ValueError: labels do not fit the logits, or the prior is no modality.

    Source: arXiv 2603.17514, section 3.5, equations 5 to 8.

    >>> weights = torch.tensor([[0.5, 0.5]])
    >>> halves = Output(torch.zeros(1, 2), {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, {}, weights)
    >>> terms = loss_terms(halves, torch.tensor([0]), aux_weight=0.3, gate_weight=0.1, gate_prior="b")
    >>> {name: round(float(term), 4) for name, term in terms.items()}
    {'fused': 0.6931, 'modality': 1.3863, 'gate': 0.6931, 'total': 2.1488}
    """
    if shares is None:
        same = torch.full((len(labels),), 1 / len(labels), device=labels.device)
        shares = Shares(same, {modality: same for modality in output.modality_logits})
    of = shares.modality
    terms: dict[str, Tensor] = {}
    if len(output.modality_logits) != 1:
        terms["fused"] = classification_loss(output.logits, labels, shares.whole, class_weights)
    for name, logits in (("modality", output.modality_logits), ("auxiliary", output.aux_logits)):
        if logits:
            terms[name] = _summed(classification_loss(logits[m], labels, of[m], class_weights) for m in logits)
    if output.modality_weights is not None and gate_prior is not None:
        if gate_prior not in output.modality_logits:
            raise ValueError(f"gate_prior must be one of {', '.join(output.modality_logits)}, got '{gate_prior}'")
        column = list(output.modality_logits).index(gate_prior)
        terms["gate"] = gate_loss(output.modality_weights[:, column], of[gate_prior])
    terms |= {name: _mean(_at_least_fp32(values), shares.whole) for name, values in output.penalties.items()}
    weights = {"auxiliary": aux_weight, "gate": gate_weight}
    return terms | {"total": _summed(weights.get(name, 1.0) * term for name, term in terms.items())}


def classification_loss(
    logits: Tensor, labels: Tensor, shares: Tensor | None = None, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of (B,) integer labels, or binary cross-entropy of (B, C) float ones (mean over the classes).

    Args:
        logits: (B, C).
        labels: One of the two.
        shares: (B,), what each sample counts; None: all the same, a mean.
        class_weights: (C,), by which the loss of a sample is multiplied according to its class; with several labels,
            the loss of a label where it is positive.

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
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), pos_weight=class_weights, reduction="none"
        ).mean(1)
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
        if class_weights is not None:
            losses = losses * class_weights[labels]
    return _mean(losses, shares)


def gate_loss(weights: Tensor, shares: Tensor | None = None) -> Tensor:
    """Mean of -log w over the batch, for the best modality's weights w (B,).

    >>> round(float(gate_loss(torch.tensor([0.25]))), 4)
    1.3863
    """
    # A softmax can underflow to zero, whose logarithm would make the whole loss infinite.
    losses = -_at_least_fp32(weights).clamp_min(torch.finfo(torch.float32).tiny).log()
    return _mean(losses, shares)


def _mean(losses: Tensor, shares: Tensor | None) -> Tensor:
    return losses.mean() if shares is None else (losses * shares.to(losses.dtype)).sum()


def _summed(each: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(each)).sum()


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
