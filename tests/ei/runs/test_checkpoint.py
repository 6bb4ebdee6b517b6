import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ei.runs.checkpoint import read_checkpoint, restore, trained_state, write_checkpoint


@pytest.fixture
def model() -> nn.Module:
    """A frozen layer and a trained one."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def test_round_trip_of_what_is_trained(model, tmp_path):
    path = tmp_path / "new" / "best.safetensors"
    state = trained_state(model)
    assert list(state) == ["1.weight", "1.bias"]
    write_checkpoint(path, state, {"epoch": 3, "val": {"mAP": 0.5}})
    nn.init.zeros_(model[1].weight)
    checkpoint = read_checkpoint(path)
    restore(model, checkpoint.parameters)
    assert all(torch.equal(trained_state(model)[name], tensor) for name, tensor in state.items())
    assert checkpoint.notes == {"epoch": 3, "val": {"mAP": 0.5}}
    assert [entry.name for entry in path.parent.iterdir()] == ["best.safetensors"]


def test_the_state_is_a_copy(model):
    state = trained_state(model)
    before = state["1.bias"].clone()
    nn.init.ones_(model[1].bias)
    assert torch.equal(state["1.bias"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_float_type(tmp_path, dtype):
    tensors = {
        "a": torch.randn(3, 2).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    write_checkpoint(tmp_path / "c", tensors, {})
    back = read_checkpoint(tmp_path / "c").parameters
    assert all(torch.equal(back[name], tensor) and back[name].dtype == dtype for name, tensor in tensors.items())


@pytest.mark.fault("a checkpoint damaged: {fault}", "refused by name")
@pytest.mark.parametrize("fault", ["bit", "truncated", "empty", "text", "missing", "other"])
def test_damage_is_seen(model, tmp_path, fault):
    path = tmp_path / "last.safetensors"
    write_checkpoint(path, trained_state(model), {})
    payload = bytearray(path.read_bytes())
    if fault == "bit":
        payload[-1] ^= 0x10
        path.write_bytes(payload)
    elif fault == "missing":
        path.unlink()
    elif fault == "other":
        save_file(trained_state(model), path)
    else:
        path.write_bytes({"truncated": bytes(payload[:-9]), "empty": b"", "text": b"hello"}[fault])
    with pytest.raises(ValueError, match="last.safetensors"):
        read_checkpoint(path)


@pytest.mark.fault("parameters missing, unknown or of another shape", "refused, all in one message; nothing changed")
def test_misfits_come_together_and_change_nothing(model):
    before = trained_state(model)
    with pytest.raises(ValueError) as error:
        restore(model, {"1.weight": torch.zeros(2, 5), "stranger": torch.zeros(1)})
    for part in ("missing: 1.bias", "unexpected: stranger", "of another shape: 1.weight"):
        assert part in str(error.value)
    assert all(torch.equal(trained_state(model)[name], tensor) for name, tensor in before.items())
