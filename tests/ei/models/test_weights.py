"""Reading files of weights that may be anything."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ei.models.weights import misfit, read_weights

TENSORS = {"a": torch.arange(3.0), "b": torch.zeros(2, 2, dtype=torch.float16)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(TENSORS) and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"state_dict": TENSORS, "epoch": 1},
        {"model": TENSORS, "args": argparse.Namespace(lr=1e-3, out="x")},  # MAE, RETFound
        {"model": {"state_dict": TENSORS}},
        {"student": {f"module.backbone.{name}": -value for name, value in TENSORS.items()}}
        | {"teacher": {f"backbone.{name}": value for name, value in TENSORS.items()}},  # DINO
        {"state_dict": {f"model.{name}": value for name, value in TENSORS.items()}},  # Lightning
        {f"module.{name}": value for name, value in TENSORS.items()},  # DataParallel
        {"module.a": TENSORS["a"], "b": TENSORS["b"]},
    ],
)
def test_pickled_tensors(tmp_path: Path, suffix: str, content: dict) -> None:
    torch.save(content, tmp_path / f"w{suffix}")
    assert same(read_weights(tmp_path / f"w{suffix}"))


@pytest.mark.parametrize(
    "content", [{}, [torch.ones(1)], {"a": 1}, {"student": TENSORS}, {"model": TENSORS, "state_dict": TENSORS}]
)
def test_pickles_without_one_mapping_of_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="must hold one mapping of names to tensors"):
        read_weights(tmp_path / "w.pth")


def test_a_prefix_that_would_make_two_names_one_stays(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1), "module.a": torch.ones(1)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").keys() == tensors.keys()


def test_a_torch_that_unpickles_unsafely_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TENSORS, tmp_path / "w.pth")
    save_file(TENSORS, tmp_path / "w.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"only with torch >= 2\.10, .* this is torch 2\.9\.1.*convert .*safetensors"):
        read_weights(tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.safetensors"))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.fault("code in a pickle given as weights", "refused, nothing runs")
def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"a": torch.ones(1), "b": Touch(trace)}, tmp_path / "evil.pth")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Touch(trace)))
    for name in ("evil.pth", "bare.pt"):
        with pytest.raises(ValueError, match="damaged or of another kind"):
            read_weights(tmp_path / name)
    assert not trace.exists()


@pytest.mark.fault("a {suffix} of weights cut", "refused by name")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 7, 0.5, -1])
def test_truncated_files(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ValueError, match=f"cannot read weights from .*{path.name}: the file is damaged"):
        read_weights(path)


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    for name in ("none.safetensors", "folder.pth"):
        with pytest.raises(ValueError, match=f"must be a file, but there is none at .*{name}"):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match=r"must be a \.safetensors, \.pth or \.pt file, got .*w\.npz"):
        read_weights(tmp_path / "w.npz")


def test_misfit_says_nothing_when_all_fits() -> None:
    assert misfit(TENSORS, dict(reversed(TENSORS.items()))) == ""


def test_misfit_names_every_kind_of_difference() -> None:
    given = {"a": torch.ones(2), "c": torch.ones(1)}
    assert misfit(TENSORS, given) == "missing: b; unexpected: c; of another shape: a (2,) where (3,) is expected"


def test_misfit_counts_what_it_does_not_list() -> None:
    expected = {str(number): torch.ones(1) for number in range(20)}
    assert misfit(expected, {}) == "missing: 0, 1, 2, 3, 4, 5, 6, 7, ... (20 in all)"
