import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ei import evaluate, load
from ei.checkpoint import read_checkpoint, write_checkpoint
from ei.config import Config
from ei.data.manifest import read_manifest
from ei.evaluation import label_text, metrics_table, predict_rows, probabilities
from ei.processes import Processes
from ei.runs import load_trunk
from mor import trainable_parameters


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_every_split_and_branch(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["splits"]) == ["val", "test"]
    test = metrics["splits"]["test"]
    assert list(test["modalities"]) == ["cfp", "oct"]
    assert test["fused"]["samples"] == 9 and test["fused"]["patients"] == 5
    assert set(test["fused"]["per_class"]) == {"dark", "grey", "light"}
    assert test["fused"]["overall"]["mAP"]["low"] is not None
    assert metrics["splits"]["val"]["fused"]["overall"]["mAP"]["low"] is None  # three patients


def test_predictions_are_of_every_row_once_and_add_up(finished):
    rows = table(finished / "predictions.csv")
    assert [row["id"] for row in rows] == [f"val{i}" for i in range(6)] + [f"test{i}" for i in range(9)]
    assert rows[0]["label"] == "dark" and rows[0]["split"] == "val" and rows[0]["patient"] == "val0"
    for row in rows:
        for source in ("fused", "cfp", "oct"):
            assert sum(float(row[f"{source}:{name}"]) for name in ("dark", "grey", "light")) == pytest.approx(
                1, abs=3e-6
            )
        assert float(row["weight:cfp"]) + float(row["weight:oct"]) == pytest.approx(1, abs=2e-6)


def test_the_metrics_are_of_the_predictions(finished):
    """Accuracy again, from the file alone."""
    rows = [row for row in table(finished / "predictions.csv") if row["split"] == "test"]
    classes = ("dark", "grey", "light")
    for source in ("fused", "cfp", "oct"):
        right = [max(classes, key=lambda name, r=row: float(r[f"{source}:{name}"])) == row["label"] for row in rows]
        test = json.loads((finished / "metrics.json").read_text())["splits"]["test"]
        measured = test["fused"] if source == "fused" else test["modalities"][source]
        assert measured["overall"]["accuracy"]["value"] == pytest.approx(np.mean(right))


def test_gates_by_vit_and_layer(finished):
    gates = json.loads((finished / "gates.json").read_text())
    assert set(gates) == {"primary/cfp", "primary/oct", "auxiliary/cfp", "auxiliary/oct"}
    layers = gates["primary/oct"]
    assert [layer["layer"] for layer in layers] == [
        f"blocks.{i}.mlp.{name}" for i in range(4) for name in ("fc1", "fc2")
    ]
    assert sum(layers[0]["gates"]) + layers[0]["bypass"] == pytest.approx(1)


def test_evaluating_again_gives_the_same(run):
    before = {name: (run / name).read_bytes() for name in ("metrics.json", "predictions.csv", "gates.json")}
    for name in before:
        (run / name).unlink()
    evaluate(run)
    assert {name: (run / name).read_bytes() for name in before} == before


def test_batch_size_does_not_matter(finished):
    model, config = load(finished)
    rows = read_manifest(config.data.manifest, config.data, classes=config.data.classes).split("test")
    outputs = []
    for size in (1, 4, 100):
        sized = replace(config, train=replace(config.train, batch_size=size))
        outputs.append(predict_rows(model, rows, sized, processes=Processes(torch.device("cpu"))).logits)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    np.testing.assert_allclose(outputs[0], outputs[2], atol=1e-5)


def test_load_gives_a_model_in_evaluation_mode(finished):
    model, config = load(str(finished))
    assert not model.training and config.data.modalities == ("cfp", "oct")


def test_load_gives_the_models_of_stage_1_too(finished):
    model, _ = load(finished, "oct")
    assert model.modality == "oct"
    with pytest.raises(ValueError, match="modality must be one of"):
        load(finished, "mri")


def test_load_takes_the_best_not_the_last(run):
    best = read_checkpoint(run / "stage2/best.safetensors")
    other = {name: tensor + 1 for name, tensor in best.parameters.items()}
    write_checkpoint(run / "stage2/last.safetensors", other, best.notes)
    model, _ = load(run)
    loaded = trainable_parameters(model)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in best.parameters.items())


def test_loading_leaves_the_callers_random_numbers_alone(finished):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    load_trunk(Config.load(finished / "config.yaml"))
    assert torch.equal(torch.rand(3), expected)


def test_a_manifest_that_was_changed_since_training_is_refused(run):
    path = run.parent / "study/manifest.csv"
    path.write_text(path.read_text().replace(",train0,train,", ",train0,test,"))
    with pytest.raises(ValueError, match="is not what it was when .* test rows may have been trained on"):
        evaluate(run)


@pytest.mark.fault("an image replaced between training and evaluation", "refused")
def test_an_image_that_was_changed_since_training_is_refused(run):
    Image.new("L", (8, 8), 99).save(run.parent / "study/test3_oct.png")
    with pytest.raises(ValueError, match="an image of .* is not what it was when .* was trained"):
        evaluate(run)


def test_another_frozen_backbone_is_refused(run):
    config = Config.load(run / "config.yaml")
    replace(config, train=replace(config.train, seed=1)).save(run / "config.yaml")  # another random 'tiny'
    with pytest.raises(ValueError, match="frozen weights of backbone 'tiny' are not those"):
        load(run)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is no run: it has no config.yaml"),
        (lambda run: (run / "stage2/best.safetensors").unlink(), "has no trained model yet"),
        (lambda run: (run / "stage2/best.safetensors").write_bytes(b"x"), "cannot read the checkpoint"),
        (lambda run: (run / "config.yaml").write_text("train: {epoch: 1}"), "unknown field"),
    ],
)
def test_a_spoilt_run_is_named(run, spoil, message):
    spoil(run)
    with pytest.raises(ValueError, match=message):
        evaluate(run)


def test_logits_that_are_not_finite_are_never_written(run):
    model, config = load(run)
    with torch.no_grad():
        model.fusion.gate.bias.fill_(float("nan"))
    rows = read_manifest(config.data.manifest, config.data, classes=config.data.classes).split("test")
    with pytest.raises(ValueError, match="not finite for test0, test1"):
        predict_rows(model, rows, config, processes=Processes(torch.device("cpu")))


def test_probabilities():
    logits = np.array([[0.0, np.log(3.0)]], dtype=np.float32)
    np.testing.assert_allclose(probabilities(logits, multi_label=False), [[0.25, 0.75]])
    np.testing.assert_allclose(probabilities(logits, multi_label=True), [[0.5, 0.75]])


def test_labels_as_text():
    assert label_text(None, ["a"]) == "" and label_text((0, 0), ["a", "b"]) == ""


def test_metrics_as_text(finished, tmp_path):
    lines = metrics_table(finished)
    assert lines[0] == "val: 6 samples, patients: 3, no intervals (fewer than 5 patients, or --bootstrap 0)"
    assert any(line.startswith("fused") and "[" in line for line in lines)
    assert "has not been evaluated" in metrics_table(tmp_path)[0]
