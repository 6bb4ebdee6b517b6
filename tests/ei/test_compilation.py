import copy
import itertools
import json
from contextlib import nullcontext

import pytest
import timm
import torch

from ei.compilation import compile_backbones, require_compiler
from ei.config import Config, DataConfig, ModelConfig
from ei.data.sample import Batch
from ei.losses import loss_terms
from ei.models import Backbone, build_model
from ei.models.vit_timm import TimmBackbone
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


@pytest.mark.parametrize("enough", [True, False])
def test_there_is_room_for_the_graphs_of_every_case(monkeypatch, enough):
    """Tokens, unseen tokens, one image; a graph too many would be an error in the middle of training."""
    if not enough:
        monkeypatch.setattr("ei.compilation._MOST_GRAPHS", 1)
    vit = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    backbone = TimmBackbone(vit, 8).requires_grad_(True)
    plain = copy.deepcopy(backbone)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, *, mode, **kw: compile(model, backend="eager", **kw))
    torch._dynamo.utils.counters.clear()
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        nullcontext() if enough else pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        compile_backbones(torch.nn.ModuleList([backbone]), "on")
        for training, count in itertools.product((True, False), (4, 3, 1, 2)):
            backbone.train(training), plain.train(training)
            images, tokens = torch.randn(count, 3, 8, 8), torch.randn(count, 2, 8)
            for given in ((images,), (images, tokens), (images, tokens, torch.rand(count, 2) < 0.5)):
                with torch.set_grad_enabled(training):
                    torch.testing.assert_close(backbone(*given), plain(*given))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 18


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
