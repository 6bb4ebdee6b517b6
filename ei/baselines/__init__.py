"""Other ways to fuse modalities: the methods that Early Intervention is compared to, and the textbook ones.

Each is called with a Batch and returns an Output, supports samples that lack modalities, and has backbones that learn
as ``config.adapter`` says. docs/baselines.md says how to run those of the paper, and what they leave open.
"""

from collections.abc import Callable, Mapping, Sequence

from ei.baselines.coscat import CosCat
from ei.baselines.cross import CrossAttention
from ei.baselines.dynmm import DynMM
from ei.baselines.early import EarlyFusion
from ei.baselines.joint import JointEmbedding
from ei.baselines.late import Average, Learned, Maximum, Weighted, late
from ei.baselines.mm_mil import MMMIL
from ei.baselines.mmrad import MMRAD
from ei.baselines.raddiag import RadDiag
from ei.baselines.sfusion import SFusion
from ei.baselines.unimodel import OneBackbone
from ei.config import BaselineConfig
from ei.models.backbone import Backbone
from ei.models.output import Classifier

__all__ = ["BASELINES"]

BASELINES: Mapping[str, Callable[[Sequence[str], Callable[[], Backbone], int, BaselineConfig], Classifier]] = {
    "mm-mil": MMMIL,
    "sfusion": SFusion,
    "coscat": CosCat,
    "raddiag": RadDiag,
    "dynmm": DynMM,
    "mmrad": MMRAD,
    "unimodel": OneBackbone,
    "early": EarlyFusion,
    "late-average": late(lambda modalities, classes, settings: Average()),
    "late-weighted": late(lambda modalities, classes, settings: Weighted(modalities)),
    "late-max": late(lambda modalities, classes, settings: Maximum()),
    "late-learned": late(lambda modalities, classes, settings: Learned(modalities, classes, settings.learned_hidden)),
    "cross": CrossAttention,
    "joint": JointEmbedding,
}
"""Name -> the model of (modalities, what makes a fresh backbone, number of classes, settings)."""
