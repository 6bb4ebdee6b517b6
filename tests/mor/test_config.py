import json
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from mor import MoRConfig
from mor.config import make_config


def test_defaults_are_the_papers():
    config = MoRConfig()
    assert (config.ranks, config.scaling) == ((2, 4, 8), (2, 2, 2))
    assert (config.bypass, config.dropout, config.router_outputs) == (True, 0.0, 4)


@pytest.mark.parametrize(
    ("ranks", "bypass", "outputs"), [((4,), False, 0), ((4,), True, 2), ((4, 4, 4), False, 3), ((1, 2), True, 3)]
)
def test_router_outputs(ranks, bypass, outputs):
    assert MoRConfig(ranks=ranks, bypass=bypass).router_outputs == outputs


def test_alphas_may_be_fractions():
    assert MoRConfig(ranks=[2, 3], alphas=[0.5, 6]).scaling == (0.25, 2.0)


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        MoRConfig().ranks = (1,)


def test_json_round_trip():
    config = MoRConfig(ranks=(3, 5), alphas=(1.5, 2), bypass=False, dropout=0.1)
    assert MoRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_alphas_left_out_equal_alphas_written_out():
    assert MoRConfig() == MoRConfig(alphas=(4, 8, 16))
    assert hash(MoRConfig()) == hash(MoRConfig(alphas=(4, 8, 16)))
    assert MoRConfig() != MoRConfig(alphas=(4, 8, 8)) and MoRConfig() != MoRConfig(bypass=False)


def test_alphas_left_out_follow_ranks_that_are_replaced():
    assert replace(MoRConfig(), ranks=(4, 4, 4)).scaling == (2, 2, 2)
    assert replace(MoRConfig(), ranks=(4,)).scaling == (2,)
    assert replace(MoRConfig(alphas=(4, 8, 16)), ranks=(4, 4, 4)).scaling == (1, 2, 4)


def test_numpy_integers_are_integers():
    config = MoRConfig(ranks=(np.int64(2), np.int64(4)), alphas=(np.float32(1), 2))
    assert json.dumps(config.to_dict()) and config == MoRConfig(ranks=(2, 4), alphas=(1.0, 2.0))


def test_an_older_pickle_holds_the_fields_alone():
    config = MoRConfig(ranks=(2, 4), alphas=(3, 5))
    older = object.__new__(MoRConfig)  # as pickle makes it
    vars(older).update({item.name: getattr(config, item.name) for item in fields(config)})
    assert older.scaling == (1.5, 1.25) and older == config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"ranks": ()}, ValueError, "ranks must be one or more positive integers"),
        ({"ranks": (0, 2)}, ValueError, "ranks must be one or more positive integers"),
        ({"ranks": 4}, TypeError, "ranks must be a sequence"),
        ({"ranks": "24"}, TypeError, "ranks must be a sequence"),
        ({"ranks": (2.0,)}, TypeError, "ranks must hold only integers"),
        ({"ranks": (True,)}, TypeError, "ranks must hold only integers"),
        ({"alphas": ("1", 2, 3)}, TypeError, "alphas must hold only numbers"),
        ({"alphas": (1, 2)}, ValueError, "one value per rank, got 2 for 3"),
        ({"alphas": (1, 2, 0)}, ValueError, "alphas must be positive"),
        ({"alphas": (1, 2, float("nan"))}, ValueError, "alphas must be positive and finite"),
        ({"bypass": 1}, TypeError, "bypass must be True or False"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1"),
        ({"dropout": float("nan")}, ValueError, "dropout must be at least 0 and below 1"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number"),
    ],
)
def test_refuses_what_makes_no_sense(fields, error, message):
    with pytest.raises(error, match=message):
        MoRConfig(**fields)


def test_fields_replace_those_of_a_config():
    assert make_config(None, {}) == MoRConfig()
    assert make_config(MoRConfig(dropout=0.1), {"ranks": (4,)}) == MoRConfig(ranks=(4,), dropout=0.1)


def test_from_dict_names_unknown_fields():
    with pytest.raises(ValueError, match="unknown field of MoRConfig: rank;"):
        MoRConfig.from_dict({"rank": 4})
