"""Baselines through training, evaluation, prediction and resuming."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ei.training as training
from ei import evaluate, predict, train
from ei.config import BaselineConfig, Config
from ei.runs.checkpoint import read_checkpoint
from ei.runs.loading import load
from ei.runs.setup import require_negatives

DOCS = Path(__file__).parents[3] / "docs/baselines.md"
FUSIONS = ["mm-mil", "coscat", "late-average", "unimodel"]


@pytest.fixture(scope="module")
def unevaluated(tmp_path_factory: pytest.TempPathFactory, write_study: Callable[..., Path]) -> Path:
    """Training rows alone: such a run is over at once."""
    return write_study(tmp_path_factory.mktemp("unevaluated"), {"train": 12})


@pytest.fixture
def config(lasting_manifest: Path, study_config: Callable[..., Config], small: dict) -> Callable[..., Config]:
    def make(fusion: str, manifest: Path = lasting_manifest, **settings: object) -> Config:
        base = study_config(manifest, bootstrap=0, **settings)
        model = replace(base.model, fusion=fusion)
        return replace(base, model=model, baseline=BaselineConfig(**small.get(fusion, {})))

    return make


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_run(config, tmp_path: Path, capsys: pytest.CaptureFixture[str], fusion: str) -> None:
    run = train(config(fusion), tmp_path / "run")
    note = f"note: fusion '{fusion}' has no first stage, so stages is '2'"
    two_stages, told = fusion == "late-average", capsys.readouterr().out
    assert (note in told) == (not two_stages)
    assert ("\nstage 2, epoch 1/1  loss" in told, "\ntraining, epoch 1/1  loss" in told) == (two_stages, not two_stages)
    assert Config.load(run / "config.yaml").train.stages == ("both" if two_stages else "2")
    assert (run / "stage1").exists() == two_stages
    record = json.loads((run / "stage2/metrics.jsonl").read_text().splitlines()[-1])
    own = {"coscat": {"modality", "cosine"}, "late-average": {"modality"}}.get(fusion, set())
    assert set(record["loss"]) == {"fused", "total"} | own
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["splits"]["test"]["modalities"]) == ({"cfp", "oct"} if "modality" in own else set())
    assert metrics["modalities"] == ["cfp", "oct"]
    predict(run, config(fusion).data.manifest, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        columns = next(csv.DictReader(file)).keys()
    weighs = fusion in ("mm-mil", "late-average")
    assert {name.partition(":")[0] for name in columns if ":" in name} == (
        {"fused"} | ({"cfp", "oct"} if "modality" in own else set()) | ({"weight"} if weighs else set())
    )
    assert ("weight:oct" in columns) == weighs
    page = (run / "report.html").read_text()
    assert fusion in page and ("Stage 2" in page) == two_stages
    gates = json.loads((run / "gates.json").read_text())
    whose = {"late-average": {"primary/cfp", "primary/oct"}, "unimodel": {"encoder/cfp+oct"}}
    assert set(gates) == whose.get(fusion, {"encoders/cfp", "encoders/oct"})
    assert evaluate(run)["splits"]["test"] == metrics["splits"]["test"]


def test_a_run_goes_on_where_it_stopped(config, unevaluated: Path, tmp_path: Path) -> None:
    run = train(config("dynmm", unevaluated), tmp_path / "run")
    before = read_checkpoint(run / "stage2/best.safetensors").parameters
    (run / "stage2/finished").unlink()
    (run / "stage2/best.safetensors").unlink()
    train(config("dynmm", unevaluated), run)
    after = read_checkpoint(run / "stage2/best.safetensors").parameters
    assert before.keys() == after.keys() and all(torch.equal(before[name], tensor) for name, tensor in after.items())
    with pytest.raises(ValueError, match=r"baseline dynmm_hidden \(was 8, is 16\)"):
        train(replace(config("dynmm", unevaluated), baseline=BaselineConfig(dynmm_hidden=16)), run)
    model, found = load(run)
    assert found.baseline == config("dynmm").baseline
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in after.items())


def test_a_joint_embedding_does_not_go_on_with_other_negatives(
    config, unevaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.Step.__call__

    def mortal(*args):
        step(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training.Step, "__call__", mortal)
        train(config("joint", unevaluated), tmp_path / "run")
    with pytest.raises(ValueError, match="begun with 6 samples at once, now there are 2"):
        train(config("joint", unevaluated, micro_batch=2), tmp_path / "run")
    train(config("joint", unevaluated), tmp_path / "run")


@pytest.mark.fault("a contrastive loss of one sample at a time", "refused, because there is nothing to tell it from")
@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"micro_batch": 1}])
def test_a_joint_embedding_needs_negatives(config, unevaluated: Path, tmp_path: Path, settings: dict) -> None:
    alone = config("joint", unevaluated, **settings)
    with pytest.raises(ValueError, match="^with fusion 'joint', two or more samples must go through the model at once"):
        train(alone, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    require_negatives(replace(alone, baseline=BaselineConfig(joint_weight=0)))
    require_negatives(config("joint", batch_size=2))
    with pytest.raises(ValueError, match="at once"):
        require_negatives(config("joint", batch_size=2), processes=2)


def test_retrieval_as_the_docs_have_it(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.S)
    train(config("joint"), tmp_path / "runs/joint")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    shares = [float(line.rpartition(": ")[2]) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert all(0 <= share <= 1 for share in shares) and shares[0] > 0


def test_missing_modalities_are_evaluated_too(config, tmp_path: Path) -> None:
    base = config("sfusion")
    run = train(replace(base, data=replace(base.data, modality_dropout=0.3)), tmp_path / "run")
    subsets = json.loads((run / "metrics.json").read_text())["splits"]["test"]["subsets"]
    assert list(subsets) == ["cfp", "oct", "cfp+oct"]
