"""How a frozen backbone is made to learn: a function per name of ``ModelConfig.adapter``, which changes it in place.

The backbone is a fork whose frozen tensors are the trunk's own, so what is to be trained is made anew, never unfrozen.
"""

from collections.abc import Callable

from ei.config import OF_PEFT, ModelConfig
from ei.models.adapters.latelora import latelora
from ei.models.adapters.losa import losa
from ei.models.adapters.mixture import mixture_of_ranks
from ei.models.adapters.peft_methods import method_of_peft
from ei.models.adapters.rlrr import rlrr
from ei.models.adapters.tuning import bitfit, frozen, full
from ei.models.adapters.vpt import vpt
from ei.models.vit import Backbone

Adapt = Callable[[Backbone, ModelConfig], None]

METHODS: dict[str, Adapt] = {
    "mor": mixture_of_ranks,
    "lora": mixture_of_ranks,
    "loramoe": mixture_of_ranks,
    "frozen": frozen,
    "full": full,
    "bitfit": bitfit,
    "vpt": vpt,
    "rlrr": rlrr,
    "losa": losa,
    "latelora": latelora,
}


def method(name: str) -> Adapt:
    """The function of an adapter's name.

    >>> method("bitfit").__name__, method("peft:ia3").__name__
    ('bitfit', 'method_of_peft')
    """
    return method_of_peft if name.startswith(OF_PEFT) else METHODS[name]
