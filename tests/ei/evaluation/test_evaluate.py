import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ei import evaluate, load, predict, train
from ei.config import Config
from ei.data.manifest import read_manifest
from ei.evaluation import inference
from ei.evaluation.inference import predict_rows
from ei.evaluation.predictions import labels_of, measure
from ei.evaluation.tables import label_text, metrics_table
from ei.evaluation.temperature import fit_temperatures
from ei.metrics.calibration import fit_temperature, probabilities
from ei.metrics.classification import summarise
from ei.processes import Processes
from ei.runs.checkpoint import read_checkpoint, write_checkpoint
from ei.runs.folder import RunFolder
from ei.runs.loading import load_trunk
from ei.runs.setup import resumes
from ei.runs.stored_logits import StoredLogits
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


@pytest.mark.usefixtures("undrawn")
def test_evaluating_again_gives_the_same(run):
    names = ("metrics.json", "predictions.csv", "gates.json", "logits.npz", "errors.json", "cost.json")
    before = {name: (run / name).read_bytes() for name in names}
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


def test_a_run_with_a_setting_that_would_change_nothing_is_read_and_goes_on(run):
    """As an earlier version wrote it, which did not refuse it."""
    path = run / "config.yaml"
    config = Config.load(path)
    assert config.train.optimizer == "adamw"
    path.write_text(path.read_text().replace("momentum: 0.95", "momentum: 0.5"))
    assert load(run)[1] == config
    assert resumes(RunFolder(run), config)


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


@pytest.mark.fault("a run whose manifest has moved", "the file that names it is named, and what may be done")
def test_a_manifest_that_has_moved(run):
    study, there = run.parent / "study", run.parent / "study/manifest.csv"
    moved = study.rename(run.parent / "moved") / "manifest.csv"
    with pytest.raises(ValueError) as error:
        evaluate(run)
    assert str(error.value) == (
        f"the manifest of {run}, '{there}', does not exist; if it has moved, write where it is now into"
        f" {run / 'config.yaml'}, or evaluate on another table with --manifest and --out"
    )
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(there), str(moved)))
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


def test_a_modality_that_a_row_lacks_has_no_logits_and_no_part_in_its_figures(finished, monkeypatch):
    """As if the model had answered for a modality without an image, which it may."""
    config = Config.load(finished / "config.yaml")
    manifest = read_manifest(config.data.manifest, config.data, classes=config.data.classes)
    rows = manifest.split("test")
    rows = [replace(row, images={**row.images, "oct": ()}) if index < 3 else row for index, row in enumerate(rows)]
    logits = np.random.default_rng(0).normal(size=(3, 9, 3)).astype(np.float32)
    kinds = [inference.LOGITS, ("modality", "cfp"), ("modality", "oct")]
    found = dict(zip(kinds, logits, strict=True)), [row.id for row in rows]
    monkeypatch.setattr(inference, "_outputs", lambda *_: iter([found]))
    predictions = predict_rows(None, rows, config, processes=Processes(torch.device("cpu")))
    assert np.isnan(predictions.modality_logits["oct"][:3]).all()
    assert np.isfinite(predictions.modality_logits["oct"][3:]).all() and np.isfinite(predictions.logits).all()
    measured = measure(predictions, rows, manifest, config, {})
    assert (measured["fused"]["samples"], measured["modalities"]["oct"]["samples"]) == (9, 6)
    assert fit_temperatures(predictions.by_source, labels_of(rows), multi_label=False)["oct"] == fit_temperature(
        logits[2, 3:], labels_of(rows[3:]), multi_label=False
    )
    predictions.modality_logits["oct"][:] = np.nan
    assert list(measure(predictions, rows, manifest, config, {})["modalities"]) == ["cfp"]
    assert fit_temperatures(predictions.by_source, labels_of(rows), multi_label=False)["oct"] == 1


def test_a_head_that_knows_nothing_is_told_of(capsys):
    """Of 400 rows, two more are right than wrong."""
    logits = np.zeros((400, 2))
    logits[:, 0] = np.where(np.arange(400) < 201, 3, -3)
    temperatures = fit_temperatures({"fused": logits, "cfp": logits / 300}, np.zeros(400, int), multi_label=False)
    assert temperatures["fused"] > 200 and 0.5 < temperatures["cfp"] < 2
    assert f"note: a temperature beyond 0.05 to 20 (fused {temperatures['fused']:.3g})" in capsys.readouterr().out


def test_raw_logits_are_kept_whole(finished):
    """They give the same figures again, bit for bit, which probabilities of six digits need not."""
    stored = StoredLogits.read(finished / "logits.npz").of_split("test")
    assert stored.sources.tolist() == ["fused", "cfp", "oct"] and stored.logits.dtype == np.float32
    measured = json.loads((finished / "metrics.json").read_text())["splits"]["test"]
    for source, logits in zip(stored.sources.tolist(), stored.logits, strict=True):
        again = summarise(
            logits, stored.labels, stored.patients.tolist(), stored.classes.tolist(), multi_label=False, bootstrap=0
        )
        summary = measured["fused"] if source == "fused" else measured["modalities"][source]
        for name, figure in again["overall"].items():
            assert figure["value"] == summary["overall"][name]["value"]


def test_the_worst_errors_name_their_images(finished):
    errors = json.loads((finished / "errors.json").read_text())
    assert errors["split"] == "test" and len(errors["samples"]) == 9  # of the 12 that may be shown
    losses = [sample["loss"] for sample in errors["samples"]]
    assert losses == sorted(losses, reverse=True)
    for sample in errors["samples"]:
        assert sample["files"] == {name: [f"{sample['id']}_{name}.png"] for name in ("cfp", "oct")}
        assert all((finished.parent / "study" / files[0]).is_file() for files in sample["files"].values())


@pytest.mark.usefixtures("undrawn")
def test_the_report_has_the_images_of_as_many_errors_as_are_wanted(run):
    for wanted, images in ((2, 4), (0, 0)):
        set_train(run, report_images=wanted)
        evaluate(run)
        assert len(json.loads((run / "errors.json").read_text())["samples"]) == wanted
        assert (run / "report.html").read_text().count("data:image/jpeg") == images


def test_cost_of_the_model(finished):
    cost = json.loads((finished / "cost.json").read_text())
    model, _ = load(finished)
    assert cost["trained"]["total"] == sum(p.numel() for p in trainable_parameters(model).values())
    assert cost["frozen"] > 0 and cost["flops"] > 2 * cost["frozen"]


def set_train(run, **changes) -> None:
    config = Config.load(run / "config.yaml")
    replace(config, train=replace(config.train, **changes)).save(run / "config.yaml")


def fused_probabilities(rows: list[dict]) -> np.ndarray:
    return np.array([[float(row[f"fused:{name}"]) for name in ("dark", "grey", "light")] for row in rows])


@pytest.mark.usefixtures("undrawn")
def test_temperatures_change_probabilities_and_nothing_else(run):
    before, table_before = json.loads((run / "metrics.json").read_text()), table(run / "predictions.csv")
    set_train(run, temperature=True)
    metrics = evaluate(run)
    stored = StoredLogits.read(run / "logits.npz")
    val = stored.of_split("val")
    for source, temperature in metrics["temperatures"].items():
        index = stored.sources.tolist().index(source)
        # Of the val rows and no others.
        assert temperature == fit_temperature(val.logits[index], val.labels, multi_label=False)
    assert set(metrics["temperatures"]) == {"fused", "cfp", "oct"}
    assert metrics["temperatures"]["fused"] != 1
    for split, measured in metrics["splits"].items():
        for source, summary in {"fused": measured["fused"], **measured["modalities"]}.items():
            old = before["splits"][split]
            old = old["fused"] if source == "fused" else old["modalities"][source]
            assert summary.pop("uncalibrated") == old.pop("calibration")
            after = summary.pop("calibration")
            assert summary == old
            if split == "val":
                old_loss = json.loads((run / "metrics.json").read_text())["splits"]["val"]
                old_loss = old_loss["fused"] if source == "fused" else old_loss["modalities"][source]
                assert after["log_loss"]["value"] <= old_loss["uncalibrated"]["log_loss"]["value"]
    rows = table(run / "predictions.csv")
    expected = probabilities(stored.logits[0].astype(float) / metrics["temperatures"]["fused"], False)
    np.testing.assert_allclose(fused_probabilities(rows), expected, atol=6e-7)
    assert (fused_probabilities(rows).argmax(1) == fused_probabilities(table_before).argmax(1)).all()
    assert [row["weight:oct"] for row in rows] == [row["weight:oct"] for row in table_before]


@pytest.mark.usefixtures("undrawn")
def test_prediction_has_the_temperatures_of_the_evaluation(run, tmp_path):
    set_train(run, temperature=True)
    evaluate(run)
    predict(run, run.parent / "study/manifest.csv", tmp_path / "out.csv")
    new, old = table(tmp_path / "out.csv")[12:], table(run / "predictions.csv")
    assert [{**row, "split": "", "label": ""} for row in old] == new


@pytest.mark.fault("no temperature, a damaged one, or that of another model", "nothing is predicted")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: None, "has no temperature yet .*; 'ei evaluate .*' fits it"),
        (lambda run: (run / "temperature.json").write_text("{"), "temperature.json is damaged; 'ei evaluate"),
        (lambda run: (run / "temperature.json").write_text('{"temperatures": {}}'), "temperature.json is damaged"),
        (
            lambda run: (run / "temperature.json").write_text('{"model": "x", "temperatures": {"fused": 0}}'),
            "temperature.json is damaged",
        ),
        (
            lambda run: (run / "temperature.json").write_text('{"model": "x", "temperatures": {"fused": 2}}'),
            "was fitted for another model than .*best.safetensors; 'ei evaluate",
        ),
    ],
)
def test_no_probability_is_given_without_the_temperature_that_was_asked_for(run, tmp_path, spoil, message):
    set_train(run, temperature=True)
    spoil(run)
    with pytest.raises(ValueError, match=message):
        predict(run, run.parent / "study/manifest.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_temperature_without_val_rows_is_refused_before_training(manifest, study_config, tmp_path):
    manifest.write_text(manifest.read_text().replace(",val,", ",train,"))
    with pytest.raises(ValueError, match="temperature is fitted on val rows, and the manifest has none"):
        train(study_config(manifest, temperature=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("undrawn")
def test_temperatures_of_several_labels(manifest, study_config, tmp_path):
    lines = list(csv.reader(manifest.read_text().splitlines()))
    flags = {"dark": ("0", "1"), "grey": ("1", "0"), "light": ("1", "1")}
    rows = [[*line[:3], *flags[line[3]], *line[4:]] for line in lines[1:]]
    content = [["id", "patient", "split", "bright", "odd", "cfp", "oct"], *rows]
    manifest.write_text("\n".join(map(",".join, content)) + "\n")
    config = study_config(manifest, temperature=True, stages="2")
    config = replace(config, data=replace(config.data, labels=("bright", "odd")))
    run = train(config, tmp_path / "run")
    val = StoredLogits.read(run / "logits.npz").of_split("val")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["temperatures"]["fused"] == fit_temperature(val.logits[0], val.labels, multi_label=True)
    assert set(metrics["splits"]["test"]["fused"]["calibration"]["of"]) == {"bright", "odd"}
    assert (run / "report.html").is_file()


def test_labels_as_text():
    assert label_text(None, ["a"]) == "" and label_text((0, 0), ["a", "b"]) == ""


def test_metrics_as_text(finished, tmp_path):
    lines = metrics_table(finished)
    assert lines[0] == "val: 6 samples, patients: 3, no intervals (fewer than 5 patients, or --bootstrap 0)"
    assert any(line.startswith("fused") and "[" in line for line in lines)
    assert metrics_table(tmp_path) == [
        f"{tmp_path} has not been evaluated, because its manifest has neither val nor test rows;"
        f" 'ei evaluate {tmp_path} --manifest OTHER --out FOLDER' does it on other samples"
    ]
