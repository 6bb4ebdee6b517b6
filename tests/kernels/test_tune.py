"""The command that measures a card, tried where there is none: its reference, its judgement, and the whole of it."""

import doctest
import json

import pytest
import torch

from mor_kernels import measure, reference, tables, tune
from mor_kernels.blocks import Blocks
from mor_kernels.reference import TOLERANCE, draw, error, exact, red
from mor_kernels.tables import Table

ARGUMENTS = ["--device", "cpu", "--seconds", "0"]


def test_the_formulas_are_what_autograd_makes_of_the_definition(device):
    problem = draw(9, 24, 40, tune.LAYOUT, torch.float64, device)
    found = exact(problem)
    leaves = [t.requires_grad_() for t in (problem.x, problem.a, problem.b, problem.router_weight, problem.router_bias)]
    x, a, b, router_weight, router_bias = leaves
    gates = (x @ router_weight.T + router_bias).softmax(-1)
    y = x @ problem.weight.T + problem.bias
    experts = zip(a.split(tune.LAYOUT.ranks), b.split(tune.LAYOUT.ranks), tune.LAYOUT.scaling, strict=True)
    for i, (A, B, scale) in enumerate(experts):
        y = y + gates[:, i : i + 1] * scale * (x @ A.T @ B)
    expected = {"y": y.detach(), **dict(zip(tune.GRADIENTS, torch.autograd.grad(y, leaves, problem.dy), strict=True))}
    for name, value in expected.items():
        assert error(found[name], value) < 1e-12, name


@pytest.mark.parametrize("name", ["branch branch", "tail tail", "library"])
def test_every_way_there_and_back_is_right(name, device):
    problem = draw(40, 24, 40, tune.LAYOUT, torch.float32, device)
    got = tune.steps(problem)[name]()
    assert got.keys() == {"y", *tune.GRADIENTS}
    assert red(got, exact(problem), torch.float32) is None


def test_every_part_is_right_and_counts_its_bytes(device):
    problem = draw(40, 24, 40, tune.LAYOUT, torch.float32, device)
    expected = exact(problem)
    x, y, weight, kept = 40 * 24 * 4, 40 * 40 * 4, 40 * 24 * 4, 40 * (14 + 4) * 4
    gated, dz = 40 * 16 * 4, 40 * 32 * 4  # padded
    moved = {
        "shrink": x + kept + gated,
        "branch": x + y + kept,
        "dy_side": y + kept + dz + x,
        "weight_grad": x + dz,
        "matmul_tail": x + weight + gated + y,
    }
    found = tune.parts(problem, expected)
    assert {name: part.bytes for name, part in found.items()} == moved
    for name, part in found.items():
        assert red(part.results(part.launch()), expected, torch.float32) is None, name


def test_what_is_wrong_is_red():
    good = torch.ones(4, 4)
    assert red({"y": good}, {"y": good.double()}, torch.bfloat16) is None
    assert "y is off by 5.0e-02" in red({"y": 1.05 * good}, {"y": good.double()}, torch.bfloat16)
    assert "inf" in red({"y": good.fill_diagonal_(float("nan"))}, {"y": good.double()}, torch.bfloat16)
    assert "inf" in red({"y": torch.ones(4)}, {"y": torch.ones(4, 4)}, torch.bfloat16)
    assert TOLERANCE[torch.float32] < TOLERANCE[torch.float16] < TOLERANCE[torch.bfloat16]


def test_a_dry_run_goes_all_the_way_and_cannot_be_used(device, tmp_path, capsys):
    if device == "cuda":
        pytest.skip("needs the interpreter")
    out = tmp_path / "table.json"
    tune.main([*ARGUMENTS, "--shape", "24,40", "--out", str(out)])
    content = json.loads(out.read_text())
    assert {entry["kernel"] for entry in content["tiles"]} == set(tune.CANDIDATES)
    (forms,) = content["forms"]
    assert (forms["K"], forms["O"], forms["below_rows"]) == (24, 40, 4096)
    assert all(evidence["microseconds"] and not evidence["refused"] for evidence in content["measured"]["tiles"])
    assert content["dry_run"] is True and content["made"]["git"]["commit"]
    with pytest.raises(ValueError, match="dry_run must be absent"):
        tables.read_table(out, "cpu")
    # But for that mark it is a table.
    del content["dry_run"]
    out.write_text(json.dumps(content))
    table = tables.read_table(out, "cpu")
    assert len(table.tiles) == 5 and len(table.forms) == 1
    assert "beta = 1 costs" in capsys.readouterr().out


def test_a_dry_run_is_not_written_among_the_tables_that_ship(device, capsys):
    if device == "cuda":
        pytest.skip("needs the interpreter")
    with pytest.raises(SystemExit):
        tune.main([*ARGUMENTS, "--out", str(tables.SHIPPED / "cpu.json")])
    assert "the interpreter's times mean nothing" in capsys.readouterr().err


def small_run(device: str, **changes) -> tune.Run:
    settings = {
        "device": device, "dtype": torch.float32, "shapes": ((24, 40),), "tile_shapes": ((24, 40),), "rows": (40,),
        "candidates": {"shrink": [Blocks(16, 16), Blocks(32, 16)]}, "seconds": 0.0, "until": float("inf"),
        "tiles_until": float("inf"),
    }  # fmt: skip
    return tune.Run(**settings | changes)


def test_a_wrong_tile_gets_no_time_and_cannot_win(device, monkeypatch):
    if device == "cuda":
        pytest.skip("captures no graph outside a side stream")
    shrink = tune.shrink
    base = tables.table_of(torch.device(device))

    def wrong_with_16_rows(x, *rest):
        gated = shrink(x, *rest)
        return gated * 1.01 if tables.choose("shrink", x).rows == 16 else gated

    monkeypatch.setattr(tune, "shrink", wrong_with_16_rows)
    times, record = tune.time_candidates(small_run(device), "shrink", 40, 24, 40, base)
    assert list(times) == [Blocks(32, 16)]
    assert "gated is off by 1.0e-02" in record["refused"]["16 x 16, 4 warps, 3 stages"]


def test_a_wrong_form_gets_no_time_and_cannot_win(device, monkeypatch):
    if device == "cuda":
        pytest.skip("captures no graph outside a side stream")
    backward = tune.linear_backward

    def wrong_tail(*arguments):
        dx, *rest = backward(*arguments)
        return (dx * 1.01 if arguments[-3] == "tail" else dx, *rest)

    monkeypatch.setattr(tune, "linear_backward", wrong_tail)
    winners, (record,) = tune.tune_forms(small_run(device), tables.table_of(torch.device(device)))
    assert record["microseconds"].keys() == {"branch branch", "tail branch", "library"}
    assert all(forms.backward == "branch" for forms in winners.values())


class CompilerError(Exception):
    """With no base in common with torch's errors, as those of ptxas."""


def test_what_a_compiler_gives_up_on_leaves_the_others_their_times(device, monkeypatch):
    if device == "cuda":
        pytest.skip("captures no graph outside a side stream")
    shrink, backward = tune.shrink, tune.linear_backward
    base = tables.table_of(torch.device(device))

    def broken_with_16_rows(x, *rest):
        if tables.choose("shrink", x).rows == 16:
            raise CompilerError("ran out of registers")
        return shrink(x, *rest)

    def broken_tail(*arguments):
        if arguments[-3] == "tail":
            raise CompilerError("ran out of registers")
        return backward(*arguments)

    monkeypatch.setattr(tune, "shrink", broken_with_16_rows)
    monkeypatch.setattr(tune, "linear_backward", broken_tail)
    times, record = tune.time_candidates(small_run(device), "shrink", 40, 24, 40, base)
    assert list(times) == [Blocks(32, 16)]
    assert record["refused"] == {"16 x 16, 4 warps, 3 stages": "CompilerError: ran out of registers"}
    _, (record,) = tune.tune_forms(small_run(device), base)
    assert record["microseconds"].keys() == {"branch branch", "tail branch", "library"}
    assert record["refused"].keys() == {"branch tail", "tail tail"}


@pytest.mark.parametrize("when", ["tiles", "forms"])
def test_a_run_that_is_killed_leaves_what_it_had_measured(when, device, tmp_path, monkeypatch):
    if device == "cuda":
        pytest.skip("needs the interpreter")
    out = tmp_path / "new" / "table.json"
    name = {"tiles": "time_candidates", "forms": "steps"}[when]
    right, calls = getattr(tune, name), []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(tune, name, killed)
    monkeypatch.setattr(tune, "CANDIDATES", {kernel: tiles[:1] for kernel, tiles in tune.CANDIDATES.items()})
    with pytest.raises(KeyboardInterrupt):
        tune.main([*ARGUMENTS, "--out", str(out)])
    content = json.loads(out.read_text())
    assert len(content[when]) == len(content["measured"][when]) == 1
    assert [path.name for path in out.parent.iterdir()] == ["table.json"]


def test_tiles_leave_some_time_for_forms(device):
    run = small_run(device, tiles_until=float("-inf"))
    assert tune.tune_tiles(run, Table({}, {})) == ({}, [])
    assert not run.out_of_time


def test_a_table_that_is_there_stays(device, tmp_path, capsys):
    """A run that is killed early would put a part in its place."""
    if device == "cuda":
        pytest.skip("needs the interpreter")
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(SystemExit):
        tune.main([*ARGUMENTS, "--out", str(tmp_path / "table.json")])
    assert "table.json exists already; move it away, or name another file" in capsys.readouterr().err
    assert (tmp_path / "table.json").read_text() == "{}"


def test_a_file_that_cannot_be_written_is_known_before_anything_is_measured(device, tmp_path, capsys):
    if device == "cuda":
        pytest.skip("needs the interpreter")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        tune.main([*ARGUMENTS, "--out", str(tmp_path / "file" / "table.json")])
    printed = capsys.readouterr()
    assert "table.json cannot be written: " in printed.err and "beta" not in printed.out


def test_the_safe_form_stays_unless_another_is_clearly_faster():
    branch, tail = {"branch branch": 100.0}, {"tail tail": 99.0}
    assert tune.fastest(branch | tail | {"library": 99.0}) == ("branch", "branch", False)
    assert tune.fastest(branch | {"tail tail": 90.0, "library": 89.0}) == ("tail", "tail", False)
    assert tune.fastest(branch | tail | {"library": 90.0}) == ("branch", "branch", True)
    assert tune.fastest({"library": 900.0}) == ("branch", "branch", True)


def test_time_that_is_up_leaves_what_is_complete(device):
    run = small_run(device, until=float("-inf"), tiles_until=float("-inf"))
    assert tune.tune_tiles(run, Table({}, {})) == ({}, [])
    assert tune.tune_forms(run, Table({}, {})) == ({}, [])


def test_tiles_too_large_for_the_chip_are_known_before_they_are_compiled():
    assert tune.shared_floor("matmul_tail", Blocks(128, 64, 128, stages=3), 2) == 65536  # as compiled for sm_80
    assert tune.shared_floor("branch", Blocks(64, 128, 128, stages=3), 2) == 2 * 128 * (64 + 32) * 2
    assert tune.shared_floor("weight_grad", Blocks(0, 64, 128, stages=3), 2) == 2 * 64 * (128 + 32) * 2


def test_candidates_are_tiles_that_a_table_may_name():
    for kernel, candidates in tune.CANDIDATES.items():
        assert len(set(candidates)) == len(candidates) >= 8
        tiles = {(kernel, "16-bit", bucket): tile for bucket, tile in zip((4096, None), candidates[:2], strict=True)}
        content = {"gpu": "any", "tiles": tune.tiles_as_json(tiles)}
        assert tables._parse(content, "any").tiles == tiles
    for kernel, candidates in tune.CANDIDATES.items():
        for tile in candidates:
            tables._parse({"gpu": "any", "tiles": tune.tiles_as_json({(kernel, "16-bit", None): tile})}, "any")


def test_calls_take_turns_in_a_shuffled_order():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.in_turn(calls, 0.0, launches_count=False, device="cpu", least=20)
    assert all(len(t) == 20 and min(t) > 0 for t in times.values())
    rounds = [tuple(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2


@pytest.mark.parametrize("module", [measure, reference, tables, tune])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--rows", "40", "50"], "--rows must fall into one bucket each, got (40, 50)"),
        pytest.param([], "no CUDA device is available", marks=pytest.mark.skipif("torch.cuda.is_available()")),
    ],
)
def test_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err
