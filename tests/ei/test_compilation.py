import json

import pytest
import torch

from ei.compilation import compile_backbones, require_compiler
from ei.config import Config, DataConfig, ModelConfig
from ei.data.sample import Batch
from ei.losses import loss_terms
from ei.models import Backbone, build_model
from ei.training import train

# Dynamo asks every input for its gradient, and silences what torch says to that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

MODALITIES = ("cfp", "oct", "flair")


@pytest.fixture
def models():
    """The same classifier twice."""
    config = Config(
        data=DataConfig(modalities=MODALITIES, image_size=16), model=ModelConfig(backbone="tiny", ranks=(1, 2))
    )
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(build_model(config, 3))
    return made


def batch_of(samples: int, images: int = 1) -> Batch:
    return Batch(
        {name: torch.randn(samples, images, 3, 16, 16) for name in MODALITIES},
        present={name: torch.ones(samples, images, dtype=torch.bool) for name in MODALITIES},
        labels=torch.arange(samples) % 3,
        ids=[str(number) for number in range(samples)],
    )


def gradients(model, batch):
    model.zero_grad()
    loss_terms(model(batch), batch.labels, aux_weight=0.3, gate_weight=0.1, gate_prior="cfp")["total"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_every_vit_becomes_one_graph_and_they_share_them(models, monkeypatch):
    plain, compiled = models
    names = list(compiled.state_dict())
    compile = torch.compile
    # The same tracing without what comes after it, which takes minutes.
    monkeypatch.setattr(torch, "compile", lambda model, *, mode, **kw: compile(model, backend="eager", **kw))
    compile_backbones(compiled, "on")
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    for samples, images in [(4, 1), (4, 1), (3, 1), (2, 2)]:
        batch = batch_of(samples, images)
        torch.testing.assert_close(gradients(compiled, batch), gradients(plain, batch))
    # Six ViTs: with tokens and without, for the first number of images and for any number.
    assert graphs["unique_graphs"] == 4
    assert list(compiled.state_dict()) == names


def test_a_stage_forgets_the_graphs_of_the_one_before(models, monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    compile_backbones(models[0], "graphs")
    assert forgotten


@pytest.mark.parametrize(("compile", "mode"), [("on", "default"), ("graphs", "reduce-overhead")])
def test_modes(models, monkeypatch, compile, mode):
    asked = []
    monkeypatch.setattr(Backbone, "compile", lambda self, **options: asked.append(options))
    compile_backbones(models[0], compile)
    assert asked == [{"fullgraph": True, "mode": mode}] * 6


def test_a_missing_compiler_is_one_sentence_before_training(manifest, tmp_path, study_config, monkeypatch):
    def broken(function):
        def run(*args):
            raise RuntimeError("no C++ compiler found\nlong explanation")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"compile must be 'off' where .* \(no C\+\+ compiler found\)$"):
        train(study_config(manifest, compile="on"), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_run_is_the_same_run(manifest, tmp_path, study_config):
    require_compiler(torch.device("cpu"))
    plain = train(study_config(manifest, epochs=2), tmp_path / "plain")
    compiled = train(study_config(manifest, epochs=2, compile="on"), tmp_path / "compiled")
    for stage in ("stage1/cfp", "stage1/oct", "stage2"):
        one, other = (
            [line_of(text) for text in (run / stage / "metrics.jsonl").read_text().splitlines()]
            for run in (plain, compiled)
        )
        assert one == pytest.approx(other, rel=1e-3), stage


def line_of(text: str) -> float:
    record = json.loads(text)
    return (record["loss"] or {"total": 0.0})["total"]
