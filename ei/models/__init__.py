"""The classifiers, and how a configuration becomes one."""

from collections.abc import Callable, Sequence
from typing import get_args

from ei.config import LARGEST_SIZE, Config, Fusion
from ei.models.backbone import Backbone, adapted, load_backbone
from ei.models.early_intervention import EarlyIntervention
from ei.models.fusion import LateFusion
from ei.models.output import Classifier, Output
from ei.models.parameters import count_trainable
from ei.models.unimodal import Encoder, UniModal

__all__ = [
    "MODELS",
    "Backbone",
    "Classifier",
    "EarlyIntervention",
    "Encoder",
    "LateFusion",
    "Output",
    "UniModal",
    "build_model",
    "count_trainable",
    "load_backbone",
]


def build_model(
    config: Config,
    num_classes: int,
    *,
    modality: str | None = None,
    trunk: Backbone | None = None,
    aux_trunk: Backbone | None = None,
) -> Classifier:
    """The model of a configuration: of one modality alone, or of all of them with ``config.model.fusion``.

    Args:
        config: Its data, model and baseline sections are used.
        num_classes: C.
        modality: Build the :class:`UniModal` of this modality, as the first stage trains it.
        trunk: The backbone, if it is loaded already (:func:`load_backbone`); models built from the same one
            share its frozen weights. It stays as it is.
        aux_trunk: The same for ``config.model.aux_backbone``, if there is one.

    Raises:
        ValueError: a setting that does not fit the backbone, the modalities or the adapter.

    >>> from ei.config import DataConfig
    >>> config = Config(data=DataConfig(modalities=("cfp", "oct")), model=ModelConfig(backbone="tiny"))
    >>> type(build_model(config, num_classes=4)).__name__
    'EarlyIntervention'
    """
    modalities = config.data.modalities
    if not 1 <= num_classes <= LARGEST_SIZE:
        raise ValueError(f"num_classes must be at least 1 and at most {LARGEST_SIZE}, got {num_classes}")
    if modality is not None and modality not in modalities:
        raise ValueError(f"modality must be one of {list(modalities)}, got '{modality}'")
    trunk = trunk or load_backbone(config.model, config.data.image_size)
    if modality is not None:
        return UniModal(adapted(trunk, config.model), modality, num_classes)
    auxiliary = config.model.auxiliary
    if auxiliary is None:
        aux_trunk = trunk
    elif aux_trunk is None:
        aux_trunk = load_backbone(auxiliary, config.data.image_size)
    return MODELS[config.model.fusion](config, modalities, trunk, aux_trunk, num_classes)


def _early_intervention(
    config: Config, modalities: Sequence[str], trunk: Backbone, aux_trunk: Backbone, num_classes: int
) -> EarlyIntervention:
    settings = config.model
    primary = {modality: adapted(trunk, settings) for modality in modalities}
    own = {} if settings.share_adapters else {modality: adapted(aux_trunk, settings) for modality in modalities}
    return EarlyIntervention(
        primary,
        auxiliary=own or primary,
        num_classes=num_classes,
        int_hidden=settings.int_hidden,
        int_from=settings.int_from,
        int_at=settings.int_at,
        detach_fusion=settings.detach_fusion,
    )


def _late_fusion(
    config: Config, modalities: Sequence[str], trunk: Backbone, aux_trunk: Backbone, num_classes: int
) -> LateFusion:
    primary = {modality: adapted(trunk, config.model) for modality in modalities}
    return LateFusion(primary, num_classes, detach_fusion=config.model.detach_fusion)


def _baseline(
    config: Config, modalities: Sequence[str], trunk: Backbone, aux_trunk: Backbone, num_classes: int
) -> Classifier:
    # Here, because baselines are made of what is in this package.
    from ei.baselines import BASELINES

    build = BASELINES[config.model.fusion]
    return build(modalities, lambda: adapted(trunk, config.model), num_classes, config.baseline)


MODELS: dict[str, Callable[[Config, Sequence[str], Backbone, Backbone, int], Classifier]] = {
    **dict.fromkeys(get_args(Fusion), _baseline),
    "ei": _early_intervention,
    "late": _late_fusion,
}
