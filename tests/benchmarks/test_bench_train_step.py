"""The training-step benchmark runs, says what it measured, and gives no time while gradients are wrong."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import mor.functional as functional

bench = pytest.importorskip("bench_train_step")

SMALL = ["--device", "cpu", "--backbone", "tiny", "--size", "16", "--batch", "2", "--steps", "2", "--modes", "off"]
SMALL += ["--precision", "fp32", "--variants", "frozen", "concat"]


@pytest.fixture
def no_warm_up(monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 0)


@pytest.mark.usefixtures("no_warm_up")
def test_writes_figures_a_table_and_a_picture(tmp_path, capsys):
    bench.main([*SMALL, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*_train_step.json")
    result = json.loads(path.read_text())
    assert [(m["variant"], m["compile"]) for m in result["measurements"]] == [("frozen", "off"), ("concat", "off")]
    for m in result["measurements"]:
        assert m["images_per_second"] == pytest.approx(4e3 / m["step_ms"][0], rel=1e-2)
    assert result["errors"]["concat"] < 1e-5
    assert result["git"]["commit"]
    assert "| concat | off |" in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "| concat | off |" in path.with_suffix(".md").read_text()


@pytest.mark.usefixtures("no_warm_up")
def test_wrong_gradients_get_no_time(monkeypatch, capsys):
    weigh = functional._weigh

    def wrong(rows, gates, ranks, scaling, dim):
        return weigh(rows, gates, ranks, tuple(1.01 * scale for scale in scaling), dim)

    monkeypatch.setattr(functional, "_weigh", wrong)  # of concat alone
    bench.main(SMALL)
    printed = capsys.readouterr()
    assert "No time for concat: its gradients are off." in printed.out
    assert "| frozen | off |" in printed.out and "| concat |" not in printed.out


@pytest.mark.usefixtures("no_warm_up")
def test_a_run_that_is_killed_leaves_what_it_had_measured(tmp_path, monkeypatch):
    right = bench.measure_variant

    def killed(variant, *rest):
        if variant == "concat":
            raise KeyboardInterrupt
        return right(variant, *rest)

    monkeypatch.setattr(bench, "measure_variant", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*SMALL, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*_train_step.json")
    assert [m["variant"] for m in json.loads(path.read_text())["measurements"]] == ["frozen"]
    assert "| frozen | off |" in path.with_suffix(".md").read_text()


@pytest.mark.usefixtures("no_warm_up")
@pytest.mark.parametrize("broken", ["error_of", "measure_variant"])
def test_what_cannot_run_leaves_the_others_their_times(broken, monkeypatch, capsys):
    right = getattr(bench, broken)

    def fails(variant, *rest):
        if variant == "concat":
            raise RuntimeError("out of registers\nand more")
        return right(variant, *rest)

    monkeypatch.setattr(bench, broken, fails)
    bench.main(SMALL)
    printed = capsys.readouterr().out
    assert "| frozen | off |" in printed and "| concat |" not in printed
    what = "concat" if broken == "error_of" else "concat, compile off"
    assert f"Not measured: {what} (RuntimeError: out of registers)." in printed


@pytest.mark.usefixtures("no_warm_up")
def test_out_of_time_begins_nothing_more(tmp_path, capsys):
    bench.main([*SMALL, "--minutes", "0", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Not measured: frozen, compile off (out of time)." in printed and "| frozen |" not in printed


def test_what_compiles_nothing_comes_first():
    order = bench.plan(Namespace(modes=bench.MODES, variants=bench.VARIANTS))
    assert [mode for mode, _ in order[:4]] == ["off"] * 4
    assert order[4:8] == [("graphs", "frozen"), ("on", "frozen"), ("graphs", "triton"), ("on", "triton")]
    assert len(set(order)) == 12


def test_needs_none_of_the_command_lines_packages():
    """As on a borrowed card, where nothing can be installed."""
    absent = ["tyro", "open_clip", "nibabel", "pydicom"]
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import bench_train_step"
    path = [str(Path(bench.__file__).parent), *sys.path]
    code = f"import sys; sys.path[:0] = {path!r}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
