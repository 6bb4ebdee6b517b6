import math

import pytest
import torch
from torch import nn

from mor import MoRConfig, disabled, inject, record_gates


@pytest.fixture
def model() -> nn.Module:
    return inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), targets="*", ranks=(2, 4, 8))


def set_gates(layer, gates) -> None:
    nn.init.zeros_(layer.mor_router.weight)
    with torch.no_grad():
        layer.mor_router.bias.copy_(torch.tensor(gates).log())


def test_means_over_all_tokens(model):
    gates = [0.1, 0.2, 0.3, 0.4]
    set_gates(model[0], gates)
    with record_gates(model) as record:
        model(torch.randn(2, 5, 4))
        model(torch.randn(3, 4))
    first = record.summary()["0"]
    assert first.tokens == 13
    assert first.gates == pytest.approx(gates[:3], rel=1e-6)
    assert first.bypass == pytest.approx(0.4, rel=1e-6)
    assert first.entropy == pytest.approx(-sum(g * math.log(g) for g in gates), rel=1e-6)
    assert first.effective_rank == pytest.approx(0.1 * 2 + 0.2 * 4 + 0.3 * 8, rel=1e-6)


def test_uneven_batches_count_by_token():
    model = inject(nn.Sequential(nn.Linear(1, 1)), targets="*", ranks=(1,))
    with torch.no_grad():
        model[0].mor_router.weight.copy_(torch.tensor([[10.0], [-10.0]]))
        model[0].mor_router.bias.zero_()
    with record_gates(model) as record:
        model(torch.full((3, 1), 5.0))  # the expert's
        model(torch.full((1, 1), -5.0))  # the bypass's
    assert record.summary()["0"].gates[0] == pytest.approx(0.75)


def test_without_bypass():
    model = inject(nn.Sequential(nn.Linear(4, 4)), targets="*", ranks=(1, 3), bypass=False)
    with record_gates(model) as record:
        model(torch.randn(3, 4))
    summary = record.summary()["0"]
    assert summary.bypass is None and sum(summary.gates) == pytest.approx(1)


def test_of_layers_that_are_called_by_keyword(model):
    with record_gates(model) as record:
        model[0](input=torch.zeros(3, 4))
    assert record.summary()["0"].tokens == 3


def test_a_gate_of_zero_has_no_entropy(model):
    set_gates(model[0], [0.0, 0.0, 1.0, 0.0])
    with record_gates(model) as record:
        model(torch.randn(3, 4))
    assert record.summary()["0"].entropy == 0


def test_recording_changes_nothing_and_ends(model):
    x = torch.randn(3, 4)
    before = model(x)
    with record_gates(model) as record:
        assert torch.equal(model(x), before)
    model(x)
    assert record.summary()["0"].tokens == 3
    assert not model[0]._forward_pre_hooks


def test_hooks_go_even_after_an_error(model):
    with pytest.raises(RuntimeError, match="stop"), record_gates(model):
        raise RuntimeError("stop")
    assert not model[0]._forward_pre_hooks


def test_what_did_not_run_is_left_out(model):
    with record_gates(model) as record:
        model[0](torch.zeros(0, 4))
        with disabled(model):
            model[1](torch.zeros(3, 4))
    assert record.summary() == {}


def test_nothing_is_read_back_while_recording(model, monkeypatch):
    def refuse(*_):
        raise AssertionError("a value was read from the device")

    with record_gates(model) as record:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        model(torch.randn(3, 4))
        monkeypatch.undo()
    assert record.summary()["0"].tokens == 3


def test_needs_routers():
    with pytest.raises(ValueError, match="no gates to record"), record_gates(nn.Linear(2, 2)):
        pass
    lora = inject(nn.Sequential(nn.Linear(2, 2)), "*", MoRConfig(ranks=(4,), bypass=False))
    with pytest.raises(ValueError, match="no gates to record"), record_gates(lora):
        pass


@pytest.mark.parametrize("part", ["model", "blocks"])
def test_what_was_compiled_and_run_before_is_recorded(vit, images, part):
    inject(vit, "fc1")
    torch.compiler.reset()
    for module in [vit] if part == "model" else vit.blocks:
        module.compile(backend="eager")
    with torch.no_grad():
        vit(images)
        with record_gates(vit) as record:
            vit(images)
    assert list(record.summary()) == [f"blocks.{i}.mlp.fc1" for i in range(3)]


def test_recorded_within_a_compiled_function(model):
    def tokens(x):
        with record_gates(model) as record:
            model(x)
        return [summary.tokens for summary in record.summary().values()]

    torch.compiler.reset()
    compiled = torch.compile(tokens, backend="eager")
    with torch.no_grad():
        assert [compiled(torch.randn(3, 4)) for _ in range(2)] == [[3, 3], [3, 3]]


def test_a_compiled_model_has_the_names_of_the_original(vit, images):
    inject(vit, "fc1")
    with record_gates(torch.compile(vit, backend="eager")) as record:
        vit(images)
    assert list(record.summary()) == [f"blocks.{i}.mlp.fc1" for i in range(3)]
