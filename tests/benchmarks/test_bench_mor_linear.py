"""The GPU benchmark, tried in the interpreter: all of it runs, what is wrong gets no time, targets are judged."""

import importlib
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mor_kernels

TINY = ["--device", "cpu", "--blocks", "tiny", "--rows", "40"]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not mor_kernels.is_available(), reason="needs Triton's interpreter"
)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    pytest.importorskip("peft")
    return importlib.import_module("bench_mor_linear")


@pytest.fixture(scope="module")
def whole(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """One run over everything, and the folder it wrote into."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("results")
    bench.main([*TINY, "--out", str(folder)])
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path


def test_measures_everything(bench: ModuleType, whole: tuple[dict, Path]) -> None:
    result, path = whole
    assert path.name == "cpu-interpreted_mor_linear.json"
    assert {linear["linear"] for linear in result["linears"]} == {"fc1", "fc2"}
    for linear in result["linears"]:
        assert linear["refused"] == {} and linear["providers"] == list(bench.NAMES)
        assert linear["worst_error_over_naive"].keys() == set(bench.HELD_TO_NAIVE)
        assert all(0.1 < worst <= 1.25 for worst in linear["worst_error_over_naive"].values())
        assert linear["same_bits"] == dict.fromkeys(bench.REPEATABLE, True)
        assert linear["times"].keys() == {f"{mode}, eager" for mode in bench.MODES}
        for times in linear["times"].values():
            assert times.keys() == set(bench.NAMES)
            assert times["frozen"]["ratio"] == [1.0, 1.0, 1.0]
            for found in times.values():
                median, low, high = found["microseconds"]
                assert 0 < low <= median <= high
    assert [(block["mode"], block["launch"]) for block in result["blocks"]] == [(m, "eager") for m in bench.MODES]
    for block in result["blocks"]:
        parts = [linear["times"][f"{block['mode']}, eager"]["naive"] for linear in result["linears"]]
        total = sum(part["microseconds"][0] for part in parts)
        assert block["microseconds"]["naive"] == pytest.approx(total)
        assert block["ratio"]["naive"] == pytest.approx(total / sum(part["frozen_microseconds"] for part in parts))
    setup = result["setup"]
    assert {"torch", "triton", "peft"} <= setup["versions"].keys() and "commit" in setup["git"]
    assert "times mean nothing" in setup["gpu"]


def test_names_the_table_that_it_measured_with(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOR_KERNELS_TABLE", raising=False)
    assert bench.table_in_use("a card without a table") is None
    table = tmp_path / "mine.json"
    monkeypatch.setenv("MOR_KERNELS_TABLE", str(table))
    table.write_text("{}")
    one = bench.table_in_use("any")
    table.write_text("{} ")
    assert one.startswith("mine.json ") and bench.table_in_use("any") != one


def test_draws_what_it_measured(whole: tuple[dict, Path]) -> None:
    _, path = whole
    assert path.with_suffix(".png").stat().st_size > 10_000
    svg = path.with_suffix(".svg").read_text()
    assert svg.startswith("<?xml") and "</svg>" in svg


def test_resumes_only_what_is_missing(
    bench: ModuleType, whole: tuple[dict, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, path = whole
    stored = path.read_text()
    # As if two providers of one linear had not been measured.
    partly = json.loads(stored)
    for name in ("concat", "auto"):
        del partly["linears"][0]["times"]["forward, eager"][name]
    partly["setup"]["git"]["tree_changed"] = "otherwise"  # the result file itself may be what changed
    path.write_text(json.dumps(partly))
    timed, in_turn = [], bench.in_turn

    def noting(calls: dict, *rest: object, **options: object) -> dict:
        timed.append(list(calls))
        return in_turn(calls, *rest, **options)

    monkeypatch.setattr(bench, "in_turn", noting)
    again = bench.main([*TINY, "--out", str(path.parent), "--resume"])
    assert len(timed) == 1 and set(timed[0]) == set(bench.NAMES)
    assert again["linears"][0]["times"]["backward, eager"] == before["linears"][0]["times"]["backward, eager"]
    assert again["linears"][0]["times"]["forward, eager"].keys() == set(bench.NAMES)

    other = json.loads(stored)
    other["setup"]["git"]["commit"] = "0" * 40
    path.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="--resume: .* was measured with git .*0000"):
        bench.main([*TINY, "--out", str(path.parent), "--resume"])
    path.write_text(stored)


def narrow(*more: str) -> list[str]:
    return [*TINY, "--modes", "no_grad_forward", *more]


def test_what_is_wrong_gets_no_time(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    right = mor_kernels.mor_linear

    def slightly_wrong(*tensors: torch.Tensor, form: str, **options: object) -> torch.Tensor:
        y = right(*tensors, form=form, **options)
        return y * 1.01 if form == "tail" else y

    monkeypatch.setattr(mor_kernels, "mor_linear", slightly_wrong)
    result = bench.main(narrow("--providers", "branch", "tail", "--out", str(tmp_path)))
    for linear in result["linears"]:
        assert set(linear["times"]["no_grad_forward, eager"]) == {"frozen", "branch"}
        assert linear["refused"].keys() == {"tail"}
    (block,) = result["blocks"]
    assert set(block["ratio"]) == {"frozen", "branch"}
    printed = capsys.readouterr().out
    assert "tiny fc1 T=40: MoR, fused: tail gets no time: output is off by" in printed
    assert " tail " not in printed.split("block T=40")[1].split("\n")[0]


def test_bits_that_differ_get_no_time(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = mor_kernels.mor_linear, []

    def unsteady(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(1)
        y = right(*tensors, **options)
        return y + (len(calls) % 2) * 1e-4 * torch.ones_like(y)

    monkeypatch.setattr(mor_kernels, "mor_linear", unsteady)
    result = bench.main(narrow("--providers", "branch"))
    assert {linear["refused"]["branch"] for linear in result["linears"]} == {"two runs gave different bits"}


def test_what_is_found_wrong_later_loses_its_times(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With one provider more all are checked again."""
    before = bench.main([*narrow("--providers", "branch"), "--out", str(tmp_path)])
    assert all("branch" in times for linear in before["linears"] for times in linear["times"].values())
    monkeypatch.setattr(bench, "same_bits", lambda *_: False)
    after = bench.main([*narrow("--providers", "branch", "tail"), "--out", str(tmp_path), "--resume"])
    for linear in after["linears"]:
        assert {"branch", "tail"} <= linear["refused"].keys()
        assert all(times.keys() == {"frozen"} for times in linear["times"].values())
    assert not any("branch" in block["ratio"] for block in after["blocks"])


def test_what_cannot_run_leaves_the_others_their_times(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(mor_kernels, "mor_linear", broken)
    result = bench.main(narrow("--providers", "branch", "concat"))
    for linear in result["linears"]:
        assert linear["refused"] == {"branch": "RuntimeError: out of registers"}
        assert set(linear["times"]["no_grad_forward, eager"]) == {"frozen", "concat"}


def test_out_of_time_begins_no_further_linear(bench: ModuleType, capsys: pytest.CaptureFixture) -> None:
    result = bench.main(narrow("--minutes", "0"))
    assert result["linears"] == []
    assert "out of time before tiny fc1 T=40" in capsys.readouterr().err


def test_what_the_goals_are_about_is_measured_first(bench: ModuleType) -> None:
    options = Namespace(blocks=["ViT-B", "ViT-L"], modes=list(bench.MODES), rows=list(bench.ROWS))
    order = list(bench.plan(options))
    aim = ["forward_backward"]
    assert [(block, modes, rows) for block, modes, rows, _ in order[:16:4]] == [
        ("ViT-B", aim, 65536), ("ViT-B", aim, 12608), ("ViT-B", aim, 1576), ("ViT-B", aim, 6288)
    ]  # fmt: skip
    assert {block for block, *_ in order[:32]} == {"ViT-B"} and len(order) == 64
    assert {(b, r, linear, m) for b, modes, r, linear in order for m in modes} == {
        (b, r, linear, m)
        for b in options.blocks
        for r in options.rows
        for linear in bench.BLOCKS[b]
        for m in bench.MODES
    }
    options.modes = ["forward"]
    assert {tuple(modes) for _, modes, _, _ in bench.plan(options)} == {("forward",)}


def test_a_run_that_is_killed_leaves_what_it_had_measured(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right, cells = bench.measure_cell, []

    def killed(*arguments: object) -> None:
        cells.append(arguments)
        if len(cells) == 2:
            raise KeyboardInterrupt
        right(*arguments)

    monkeypatch.setattr(bench, "measure_cell", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.main(narrow("--providers", "concat", "--out", str(tmp_path)))
    (path,) = tmp_path.iterdir()
    (linear,) = json.loads(path.read_text())["linears"]
    assert linear["times"]["no_grad_forward, eager"].keys() == {"frozen", "concat"}


def test_errors_are_found_once(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, check = [], bench.check

    def noting(*arguments: object) -> dict:
        checked.append(arguments)
        return check(*arguments)

    monkeypatch.setattr(bench, "check", noting)
    modes = ["no_grad_forward", "forward_backward"]  # which are measured one after the other
    result = bench.main([*TINY, "--modes", *modes, "--providers", "concat"])
    assert len(checked) == len(result["linears"]) == 2
    for linear in result["linears"]:
        assert linear["times"].keys() == {f"{mode}, eager" for mode in modes}


def perfect(bench: ModuleType, ratio: dict[str, float], error: float = 0.9, compiled: int | None = 0) -> dict:
    """A result in which every ViT-B linear took `ratio` times the frozen one's 10 us."""
    times = {
        f"forward_backward, {launch}": {
            name: {"microseconds": [10 * r, 0, 0], "frozen_microseconds": 10.0, "ratio": [r, r, r]}
            for name, r in ratio.items()
        }
        for launch in bench.LAUNCHES
    }
    linears = [
        {
            "block": "ViT-B", "linear": linear, "rows": rows, "providers": ["branch", "tail", "auto"], "times": times,
            "worst_error_over_naive": dict.fromkeys(bench.REPEATABLE, error),
            "same_bits": dict.fromkeys(bench.REPEATABLE, True),
        }
        for linear in bench.BLOCKS["ViT-B"]
        for rows in sorted(bench.ROWS)
    ]  # fmt: skip
    result = {"linears": linears, "compilations_when_rows_vary": compiled}
    bench.summarise(result)
    return result


FAST = {"frozen": 1.0, "naive": 7.0, "peft": 2.0, "auto": 1.3}


def verdicts(result: dict) -> list[str]:
    return [target["verdict"] for target in result["targets"]]


def test_targets_are_judged(bench: ModuleType) -> None:
    assert verdicts(perfect(bench, FAST)) == ["PASS"] * 11
    slow = perfect(bench, FAST | {"auto": 1.4})
    assert verdicts(slow) == ["FAIL"] + ["PASS"] * 10
    assert slow["targets"][0]["got"] == "1.400 (graph), 1.400 (eager)"
    assert verdicts(perfect(bench, FAST | {"auto": 2.1})) == ["FAIL"] * 8 + ["PASS"] * 3
    assert verdicts(perfect(bench, FAST | {"naive": 6.0}))[3] == "FAIL"
    assert verdicts(perfect(bench, FAST, error=1.26))[8:] == ["FAIL", "PASS", "PASS"]
    assert verdicts(perfect(bench, FAST, compiled=1))[8:] == ["PASS", "PASS", "FAIL"]


def test_what_was_not_measured_is_no_pass(bench: ModuleType) -> None:
    assert verdicts({"targets": [bench.judge(t, {"blocks": []}) for t in bench.TARGETS]}) == ["NOT MEASURED"] * 8
    assert verdicts(perfect(bench, {"frozen": 1.0, "auto": 1.3}, compiled=None)) == (
        ["PASS"] * 3 + ["NOT MEASURED"] * 5 + ["PASS"] * 2 + ["NOT MEASURED"]
    )
    missing = perfect(bench, FAST)
    missing["linears"].pop()  # fc2 at 65,536 rows, the largest
    bench.summarise(missing)
    assert [v == "PASS" for v in verdicts(missing)] == [
        False,
        True,
        True,
        False,
        True,
        True,
        True,
        False,
        *[False] * 2,
        True,
    ]
    # What failed has failed, however little was measured.
    missing["linears"][0]["same_bits"]["tail"] = False
    bench.summarise(missing)
    (bits,) = [target for target in missing["targets"] if "bits" in target["target"]]
    assert (bits["verdict"], bits["got"]) == ("FAIL", "tail, ViT-B qkv at 1,576 rows")


def test_the_summary_says_every_target_with_its_numbers(bench: ModuleType) -> None:
    lines = bench.report(perfect(bench, FAST)).splitlines()
    what = "PASS         ViT-B block at 65,536 rows, over frozen, at most 1.35 (graph and eager)"
    assert f"{what}: 1.300 (graph), 1.300 (eager)" in lines
    assert sum(line.startswith("PASS") for line in lines) == 11


def test_errors_in_fp32_may_be_rounding(bench: ModuleType) -> None:
    errors = {"naive": {"output": 1e-7}, "branch": {"output": 3e-7}}
    assert bench.wrong("branch", errors, torch.float32) is None
    assert "off by 3.0e-07" in bench.wrong("branch", errors, torch.bfloat16)
    assert "off by nan" in bench.wrong("naive", {"naive": {"output": float("nan")}}, torch.float32)


def test_backward_alone_goes_through_one_forward(bench: ModuleType) -> None:
    layers = bench.build_layers(
        8, 6, Namespace(dtype="float32", parameters="float32", device="cpu", providers=["concat"])
    )
    x, dy = bench.draw_inputs(5, 8, 6)
    forwards = []
    layers["concat"].register_forward_hook(lambda *_: forwards.append(1))
    backward = bench.calls_of(layers["concat"], x, dy)["backward"]
    first, second = backward(), backward()
    assert len(forwards) == 1 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
