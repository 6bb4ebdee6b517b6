"""The CPU benchmark runs, counts the right bytes, judges its targets, and gives no speed while results are wrong."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import mor
from mor_kernels.measure import git_state


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    pytest.importorskip("peft")
    return importlib.import_module("bench_mor_linear_cpu")


def test_writes_every_layer_and_judges_every_target(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bench.main(["--rows", "8", "--rounds", "2", "--out", str(tmp_path)])
        assert torch.get_num_threads() == 2  # as it was before
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "cpu_mor_linear.json").read_text())
    printed = capsys.readouterr().out

    assert list(result["layers"]) == ["fc1", "fc2", "qkv", "proj"]
    for layer in result["layers"].values():
        assert list(layer["ratio_to_frozen"]) == list(bench.NAMES)
        for mode in bench.MODES:
            assert layer["ratio_to_frozen"]["frozen"][mode]["median"] == 1.0
            assert layer["ratio_to_frozen"]["mor"][mode]["median"] > 0
            assert layer["frozen_ms"][mode]["q20"] <= layer["frozen_ms"][mode]["q80"]
        assert layer["frozen_ms"]["forward"]["median"] < layer["frozen_ms"]["forward_backward"]["median"]
    assert result["rows"] == 8 and result["rounds"] == 2 and result["threads"] == 1
    assert all(target["met"] == (target["median"] <= target["limit"]) for target in result["targets"])
    assert printed.count("the target is at most") == len(bench.TARGETS)
    assert printed.strip() in (tmp_path / "cpu_mor_linear.md").read_text()


def test_gives_no_speed_while_a_result_is_wrong(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class SlightlyOff(mor.MoRLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 1.001 * super().forward(x)

    monkeypatch.setattr(bench, "MoRLinear", SlightlyOff)
    with pytest.raises(SystemExit, match=r"fc1, MoR \(default\): output is off by 1.0e-03 relative to float64"):
        bench.main(["--rows", "8", "--rounds", "1", "--out", str(tmp_path)])
    assert "|" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_nan_is_an_error(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="gradient of x is off by nan"):
        bench.check_accuracy({"fc1": {"mor": {"output": 0.0, "gradient of x": float("nan")}}})


def test_counts_what_autograd_keeps(bench: ModuleType) -> None:
    rows, K, O = 5, 32, 48
    x, _ = bench.draw_inputs(rows, K, O)
    kept = {provider: bench.kept_bytes(layer, x) / rows for provider, layer in bench.build_layers(K, O).items()}
    assert kept["frozen"] == 0
    assert kept["mor"] == 4 * (14 + 4)  # h and the gates
    assert kept["peft_lora"] == 4 * bench.LORA_RANK
    assert kept["mor_eager"] > 4 * 3 * O  # a term of full width for each expert


def test_every_provider_runs_once_a_round_in_shuffled_order(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = bench.build_layers(4, 4)
    calls: list[str] = []

    def record(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> dict[str, float]:
        calls.append(next(name for name, candidate in layers.items() if candidate is layer))
        return dict.fromkeys(bench.MODES, float(len(calls)))

    monkeypatch.setattr(bench, "time_once", record)
    times = bench.time_providers(layers, *bench.draw_inputs(3, 4, 4), rounds=6)
    rounds = np.array(calls).reshape(-1, len(layers))[bench.WARM_UP_ROUNDS :]
    assert all(set(order) == set(layers) for order in rounds) and len({tuple(order) for order in rounds}) > 1
    # The times of a round stay together: each provider's n-th time is one of the n-th round's.
    stacked = np.array([times[name]["forward"] for name in layers])
    first = 1 + len(layers) * bench.WARM_UP_ROUNDS
    np.testing.assert_array_equal(np.sort(stacked.T.ravel()), np.arange(first, first + stacked.size))
    assert all(np.ptp(stacked, axis=0) == len(layers) - 1)


def test_a_run_is_a_whole_step_and_leaves_nothing_to_the_next(bench: ModuleType) -> None:
    layer = bench.build_layers(8, 6)["frozen"]
    x, dy = bench.draw_inputs(5, 8, 6)
    for _ in range(2):
        seconds = bench.time_once(layer, x, dy)
        torch.testing.assert_close(x.grad, dy @ layer.weight)
        assert 0 < seconds["forward"] < seconds["forward_backward"]


def test_a_target_is_judged_by_the_ratios_within_rounds(bench: ModuleType) -> None:
    # The ratios are 2, 1 and 0.5; the ratio of the medians would be 0.6.
    seconds = {"mor": [20.0, 1.0, 6.0], "peft_lora": [10.0, 1.0, 12.0]}
    times = {provider: {"forward": np.array(values)} for provider, values in seconds.items()}
    judged = bench.judge(bench.Target("fc2", "forward", "peft_lora", 1.0), times)
    assert judged["median"] == 1.0 and judged["met"]
    assert not bench.judge(bench.Target("fc2", "forward", "peft_lora", 0.99), times)["met"]


def test_a_mor_outside_the_repository_has_no_commit(tmp_path: Path) -> None:
    unknown = {"commit": "unknown", "code_changed": None, "tree_changed": None}
    assert git_state([tmp_path]) == unknown


def test_refuses_zero_rounds(bench: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "0"])
    assert "--rounds and --rows must be at least 1, got 0 and 1576" in capsys.readouterr().err
