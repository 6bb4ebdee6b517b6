"""What every model of this package is, and what it returns. B batch, C classes, M modalities."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from ei.data.sample import Batch


@dataclass(frozen=True)
class Output:
    """Logits of a batch, whole and by part; a part that a model does not have is empty or None.

    Where a sample lacks a modality, that modality weighs 0, and its own logits say nothing.
    """

    logits: Tensor  # (B, C), the answer
    modality_logits: dict[str, Tensor] = field(default_factory=dict)  # modality -> (B, C)
    aux_logits: dict[str, Tensor] = field(default_factory=dict)  # modality -> (B, C)
    modality_weights: Tensor | None = None  # (B, M), columns in the order of the configuration
    penalties: dict[str, Tensor] = field(default_factory=dict)  # name of a term of the loss -> (B,), weighted


class Classifier(nn.Module):
    """Any model here: called with a :class:`Batch`, it returns an :class:`Output`."""

    def forward(self, batch: Batch) -> Output:
        raise NotImplementedError

    def parts(self) -> dict[str, list[nn.Module]]:
        """The readable parts that parameters are counted by."""
        raise NotImplementedError
