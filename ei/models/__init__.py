"""The classifiers, and how a configuration becomes one."""

from collections.abc import Callable

from ei.config import Config, ModelConfig
from ei.models.backbone import Backbone, adapted, load_backbone
from ei.models.early_intervention import EarlyIntervention
from ei.models.fusion import LateFusion
from ei.models.output import Output
from ei.models.parameters import count_trainable
from ei.models.unimodal import UniModal

__all__ = [
    "MODELS",
    "Backbone",
    "EarlyIntervention",
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
) -> UniModal | LateFusion:
    """The model of a configuration: of one modality alone, or of all of them with ``config.model.fusion``.

    Args:
        config: Its data and model sections are used.
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
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
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
    return MODELS[config.model.fusion](config.model, modalities, trunk, aux_trunk, num_classes)


def _early_intervention(
    config: ModelConfig, modalities: tuple[str, ...], trunk: Backbone, aux_trunk: Backbone, num_classes: int
) -> EarlyIntervention:
    primary = {modality: adapted(trunk, config) for modality in modalities}
    own = {} if config.share_adapters else {modality: adapted(aux_trunk, config) for modality in modalities}
    return EarlyIntervention(
        primary,
        auxiliary=own or primary,
        num_classes=num_classes,
        int_hidden=config.int_hidden,
        int_from=config.int_from,
        int_at=config.int_at,
        detach_fusion=config.detach_fusion,
    )


def _late_fusion(
    config: ModelConfig, modalities: tuple[str, ...], trunk: Backbone, aux_trunk: Backbone, num_classes: int
) -> LateFusion:
    primary = {modality: adapted(trunk, config) for modality in modalities}
    return LateFusion(primary, num_classes, detach_fusion=config.detach_fusion)


MODELS: dict[str, Callable[[ModelConfig, tuple[str, ...], Backbone, Backbone, int], LateFusion]] = {
    "ei": _early_intervention,
    "late": _late_fusion,
}
