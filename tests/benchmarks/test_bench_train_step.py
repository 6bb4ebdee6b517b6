"""The training-step benchmark runs, says what it measured, and gives no time while gradients are wrong."""

import json

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
