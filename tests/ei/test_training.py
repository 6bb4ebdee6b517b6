import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ei.config import Config, ModelConfig, TrainConfig
from ei.data.manifest import ManifestError, read_manifest
from ei.evaluation.evaluate import evaluate
from ei.models import load_backbone
from ei.optimisation import TrainingError, cyclic_learning_rate, make_optimizer
from ei.runs.checkpoint import read_checkpoint
from ei.runs.loading import load, load_trunk, stage1_checkpoint
from ei.runs.snapshots import Snapshot, newest_snapshot
from ei.runtime import fingerprint
from ei.training import train


def history(stage) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def last(stage) -> Snapshot:
    return newest_snapshot(stage / "snapshots")


def test_a_run_folder_is_complete(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    stages = ("stage1/cfp", "stage1/oct", "stage2")
    kept = {f"{stage}/{name}" for stage in stages for name in ("metrics.jsonl", "best.safetensors", "finished")}
    in_snapshot = {f"{group}.safetensors" for group in ("best", "optimizer", "parameters", "random")}
    in_snapshot |= {"manifest.json", "notes.json"}
    steps = ("step-000000001", "step-000000005")  # before the first step, and after the second
    kept |= {f"{stage}/snapshots/{step}/{name}" for stage in stages for step in steps for name in in_snapshot}
    results = {"metrics.json", "predictions.csv", "gates.json", "report.html"}
    results |= {"logits.npz", "errors.json", "cost.json"}
    assert files == kept | results | {"config.yaml", ".lock"}


def test_history_begins_before_the_first_step(finished):
    first, second = history(finished / "stage2")
    assert first["epoch"] == first["step"] == 0 and first["loss"] is None
    assert set(first["val"]) == {"mAP", "mAUC", "mS2", "accuracy"}
    assert second["step"] == 2  # 12 samples in batches of 6
    assert set(second["loss"]) == {"fused", "modality", "auxiliary", "gate", "total"}
    assert set(history(finished / "stage1/cfp")[1]["loss"]) == {"modality", "total"}


def test_the_saved_configuration_is_resolved(finished):
    config = Config.load(finished / "config.yaml")
    assert config.data.classes == ("dark", "grey", "light")
    assert config.data.manifest == str(finished.parent / "study/manifest.csv")


def test_checkpoints_hold_trained_parameters_and_nothing_else(finished):
    parameters = read_checkpoint(finished / "stage2/best.safetensors").parameters
    assert sum(tensor.numel() for tensor in parameters.values()) == 4 * 40_992 + adapters_and_heads()
    assert not any(".base." in name or "pos_embed" in name for name in parameters)


def adapters_and_heads(width=64, hidden=384, classes=3, modalities=2) -> int:
    int_adapter = 2 * width + (width + 1) * hidden + (hidden + 1) * width
    return 2 * int_adapter + 2 * modalities * classes * (width + 1) + modalities * (modalities * width + 1)


def test_stage_2_starts_from_stage_1(manifest, tmp_path, study_config):
    """With steps of next to nothing, stage 2 still has what stage 1 has learned."""
    run = train(study_config(manifest, lr=1e-12, lr_low=1e-12, weight_decay=0.0), tmp_path / "run")
    stage1 = read_checkpoint(run / "stage1/oct/best.safetensors").parameters
    stage2 = read_checkpoint(run / "stage2/best.safetensors").parameters
    name = "vit.blocks.0.mlp.fc1.mor_A"
    for role in ("primary", "auxiliary"):
        torch.testing.assert_close(stage2[f"{role}.modality_oct.backbone.{name}"], stage1[f"backbone.{name}"])
    torch.testing.assert_close(stage2["auxiliary.modality_oct.head.weight"], stage1["head.weight"])
    assert not torch.allclose(stage2["primary.modality_oct.head.weight"], stage1["head.weight"])


def test_stage_1_of_another_run(finished, tmp_path):
    config = Config.load(finished / "config.yaml")
    late = replace(config, model=replace(config.model, fusion="late"))
    run = train(replace(late, train=replace(late.train, stage1_from=str(finished))), tmp_path / "run")
    for modality in ("cfp", "oct"):
        taken, there = (read_checkpoint(r / f"stage1/{modality}/best.safetensors") for r in (run, finished))
        assert all(torch.equal(taken.parameters[name], tensor) for name, tensor in there.parameters.items())
    assert not (run / "stage1/oct/metrics.jsonl").exists()


def test_stage_1_of_other_data_is_refused(finished, manifest, tmp_path):
    """It may have been trained on what are test rows here."""
    config = Config.load(finished / "config.yaml")
    other = replace(config.data, manifest=str(manifest), image_size=16)
    changed = replace(config, data=other, train=replace(config.train, stage1_from=str(finished), seed=9))
    with pytest.raises(ValueError, match="its manifest, image_size, weights of the backbone differ"):
        train(changed, tmp_path / "run")
    table = finished.parent / "study/manifest.csv"
    content = table.read_bytes()
    swapped = content.replace(b",train,", b",swap,").replace(b",test,", b",train,").replace(b",swap,", b",test,")
    try:
        table.write_bytes(swapped)
        with pytest.raises(ValueError, match="its content of .*manifest.csv differ"):
            train(replace(config, train=replace(config.train, stage1_from=str(finished))), tmp_path / "run")
    finally:
        table.write_bytes(content)
    assert not (tmp_path / "run").exists()


def test_stage_1_that_was_interrupted_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "interrupted")
    (tmp_path / "interrupted/stage1/oct/finished").unlink()
    config = Config.load(finished / "config.yaml")
    changed = replace(config, train=replace(config.train, stage1_from=str(tmp_path / "interrupted")))
    with pytest.raises(ValueError, match="its stage 1 of 'oct' is not finished"):
        train(changed, tmp_path / "run")


def write_weights(path, seed):
    """A tiny ViT of its own, as a file of weights."""
    torch.manual_seed(seed)
    save_file(load_backbone(ModelConfig(backbone="tiny"), 8).vit.state_dict(), path)
    return path


@pytest.fixture
def aux_config(manifest, tmp_path, study_config):
    """Auxiliary ViTs of other frozen weights than the primary ones; steps of next to nothing, nothing to evaluate."""
    config = study_config(without_rows(manifest, "val", "test"), lr=1e-12, lr_low=1e-12, weight_decay=0.0)
    weights = str(write_weights(tmp_path / "auxiliary.safetensors", 5))
    return replace(config, model=replace(config.model, aux_backbone="tiny", aux_weights=weights))


def test_auxiliary_vits_have_a_stage_1_of_their_own(aux_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(replace(aux_config, model=replace(aux_config.model, aux_weights="auxiliary.safetensors")), "run")
    alone, auxiliary, both = (
        read_checkpoint(run / stage / "best.safetensors") for stage in ("stage1/oct", "stage1-auxiliary/oct", "stage2")
    )
    name = "vit.blocks.0.mlp.fc1.mor_A"
    for role, learned in (("primary", alone), ("auxiliary", auxiliary)):
        expected = learned.parameters[f"backbone.{name}"]
        torch.testing.assert_close(both.parameters[f"{role}.modality_oct.backbone.{name}"], expected)
    head = "auxiliary.modality_oct.head.weight"
    torch.testing.assert_close(both.parameters[head], auxiliary.parameters["head.weight"])
    config = Config.load(run / "config.yaml")
    assert config.model.aux_weights == str(tmp_path / "auxiliary.safetensors")
    trunks = [fingerprint(load_trunk(each)) for each in (config, config.auxiliary)]
    assert trunks[0] != trunks[1]
    assert [alone.notes["trunk"], auxiliary.notes["trunk"]] == trunks
    assert both.notes["trunk"] == trunks[0] | {f"auxiliary.{key}": value for key, value in trunks[1].items()}


@pytest.mark.fault("other frozen weights", "refused")
def test_other_frozen_weights_of_the_auxiliary_vits_are_refused(aux_config, tmp_path, monkeypatch):
    """Where they differ, the adapters would be put on the wrong model."""
    run = train(aux_config, tmp_path / "run")
    load(run)
    before = (run / "stage2/best.safetensors").read_bytes()
    (run / "stage2/finished").unlink()
    write_weights(tmp_path / "auxiliary.safetensors", 6)
    for go_on in (lambda: load(run), lambda: train(aux_config, run)):
        with pytest.raises(ValueError, match="frozen weights of backbone 'tiny'.* are not those that"):
            go_on()
    assert (run / "stage2/best.safetensors").read_bytes() == before
    load(run, "oct")
    # Also when stage 1 was finished with the right ones.
    with pytest.raises(ValueError, match="frozen weights of backbone 'tiny' or of the auxiliary 'tiny' are not those"):
        load(run)


def test_stage_1_of_auxiliary_vits_is_taken_over_where_there_is_one(aux_config, tmp_path, manifest, study_config):
    def taking(source, config=aux_config):
        return replace(config, train=replace(config.train, stage1_from=str(source)))

    with_it, without = train(aux_config, tmp_path / "with"), train(study_config(manifest), tmp_path / "without")
    for source, trained in ((with_it, False), (without, True)):
        run = train(taking(source), tmp_path / f"from {source.name}")
        assert not (run / "stage1/oct/metrics.jsonl").exists()
        assert (run / "stage1-auxiliary/oct/metrics.jsonl").exists() == trained
        ours, theirs = (read_checkpoint(r / "stage1-auxiliary/oct/best.safetensors").parameters for r in (run, with_it))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    write_weights(tmp_path / "auxiliary.safetensors", 6)
    with pytest.raises(ValueError, match="its weights of the backbone differ"):
        train(taking(with_it), tmp_path / "refused")
    (with_it / "stage1-auxiliary/oct/finished").unlink()
    with pytest.raises(ValueError, match="its stage 1 of 'oct' is not finished"):
        write_weights(tmp_path / "auxiliary.safetensors", 5)
        train(taking(with_it), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_shared_adapters_from_training_to_prediction(manifest, tmp_path, study_config):
    config = study_config(manifest)
    run = train(replace(config, model=replace(config.model, share_adapters=True)), tmp_path / "run")
    before = (run / "predictions.csv").read_bytes()
    assert set(json.loads((run / "gates.json").read_text())) == {"primary+auxiliary/cfp", "primary+auxiliary/oct"}
    parameters = read_checkpoint(run / "stage2/best.safetensors").parameters
    assert sum(tensor.numel() for tensor in parameters.values()) == 2 * 40_992 + adapters_and_heads()
    evaluate(run)
    assert (run / "predictions.csv").read_bytes() == before


def test_the_gate_prior_is_the_best_modality_on_the_training_rows(manifest, tmp_path, study_config, monkeypatch):
    import ei.training as training

    asked, seen = [], []
    validate, make = training.Loop.validate, training.Loop.__init__

    def scores(self, rows):
        if getattr(self.model, "modality", None) and len(rows) == 12:
            asked.append((self.model.modality, {row.split for row in rows}))
            return {"mAP": {"cfp": 0.4, "oct": 0.6}[self.model.modality]}
        return validate(self, rows)

    def remember(self, *args, **kwargs):
        make(self, *args, **kwargs)
        seen.append(self.gate_prior)

    monkeypatch.setattr(training.Loop, "validate", scores)
    monkeypatch.setattr(training.Loop, "__init__", remember)
    train(study_config(manifest), tmp_path / "run")
    assert asked == [("cfp", {"train"}), ("oct", {"train"})]
    assert seen == [None, None, "oct"]  # stage 1 twice, then stage 2
    seen.clear()
    train(study_config(manifest, gate_prior="cfp"), tmp_path / "told")
    assert seen[-1] == "cfp"


def test_stage_1_reads_the_images_of_its_modality_alone(manifest, tmp_path, study_config, monkeypatch):
    import ei.training as training

    read = []
    step = training.Step.__call__

    def remember(self, batches):
        read.append(set(batches[0].images))
        return step(self, batches)

    monkeypatch.setattr(training.Step, "__call__", remember)
    train(study_config(manifest), tmp_path / "run")
    assert read == [{"cfp"}] * 2 + [{"oct"}] * 2 + [{"cfp", "oct"}] * 2


def test_every_epoch_has_an_order_of_its_own(manifest, tmp_path, study_config, monkeypatch):
    import ei.training as training

    orders = []
    step = training.Step.__call__

    def remember(self, batches):
        orders.append(batches[0].ids)
        return step(self, batches)

    monkeypatch.setattr(training.Step, "__call__", remember)
    train(study_config(manifest, epochs=2, stages="2"), tmp_path / "run")
    first, second = orders[0] + orders[1], orders[2] + orders[3]
    assert sorted(first) == sorted(second) and first != second


def test_the_same_seed_gives_the_same_weights(manifest, tmp_path, study_config):
    runs = [
        train(study_config(manifest, seed=seed, stages="2"), tmp_path / f"run{i}") for i, seed in enumerate((3, 3, 4))
    ]
    one, same, other = (last(run / "stage2").tensors["parameters"] for run in runs)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_number_of_workers_changes_nothing(manifest, tmp_path, study_config):
    runs = [
        train(study_config(manifest, stages="2", workers=workers), tmp_path / f"run{workers}") for workers in (0, 2)
    ]
    one, other = (last(run / "stage2").tensors["parameters"] for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_image_cache_changes_nothing_and_serves_other_runs(manifest, tmp_path, study_config, monkeypatch):
    import ei.data.image_cache as image_cache

    config = study_config(manifest, stages="2")
    cached = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    plain = train(config, tmp_path / "plain")
    assert Config.load(train(cached, tmp_path / "run") / "config.yaml").data.cache == str(tmp_path / "cache")
    monkeypatch.setattr(image_cache, "read_image", None)  # all is there
    train(cached, tmp_path / "again")
    for run in ("run", "again"):
        one, other = (read_checkpoint(folder / "stage2/best.safetensors") for folder in (plain, tmp_path / run))
        assert all(torch.equal(tensor, other.parameters[name]) for name, tensor in one.parameters.items())
        assert (tmp_path / run / "metrics.json").read_bytes() == (plain / "metrics.json").read_bytes()
    train(config, tmp_path / "run")  # a run goes on without its cache


def test_a_first_stage_is_taken_over_whatever_the_cache(finished):
    config = Config.load(finished / "config.yaml")
    cached = replace(config, data=replace(config.data, cache="elsewhere"))
    table = read_manifest(config.data.manifest, config.data, classes=config.data.classes)
    assert stage1_checkpoint(finished, "oct", cached, table, fingerprint(load_trunk(config))).parameters


def test_a_run_in_bf16_notes_the_frozen_weights_as_they_were(manifest, tmp_path, study_config):
    """In training they are held in bf16, and stage 2 begins from the same ones."""
    run = train(study_config(manifest, precision="bf16"), tmp_path / "run")
    trunks = [read_checkpoint(run / stage / "best.safetensors").notes["trunk"] for stage in ("stage1/oct", "stage2")]
    assert trunks[0] == trunks[1] == fingerprint(load_trunk(Config.load(run / "config.yaml")))


def test_training_learns(manifest, tmp_path, study_config):
    """Brightness is the class: a few epochs are enough."""
    config = study_config(manifest, epochs=12, stages="2", lr=5e-3, cycle_epochs=6)
    run = train(replace(config, data=replace(config.data, jitter=0)), tmp_path / "run")
    assert json.loads((run / "metrics.json").read_text())["splits"]["test"]["fused"]["overall"]["mAP"]["value"] > 0.8


def test_best_is_the_epoch_of_the_best_map(manifest, tmp_path, study_config):
    run = train(study_config(manifest, epochs=4, stages="2"), tmp_path / "run")
    scores = [line["val"]["mAP"] for line in history(run / "stage2")]
    notes = read_checkpoint(run / "stage2/best.safetensors").notes
    assert notes["epoch"] == int(np.argmax(scores)) and notes["val"]["mAP"] == max(scores)
    assert last(run / "stage2").notes["position"]["epoch"] == 5


def test_stops_when_nothing_gets_better(manifest, tmp_path, study_config):
    config = study_config(manifest, epochs=50, patience=2, lr=1e-12, lr_low=1e-12, stages="2")
    assert len(history(train(config, tmp_path / "run") / "stage2")) == 3


def without_rows(manifest, *splits):
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(line for line in lines if not any(f",{split}," in line for split in splits)))
    return manifest


def test_without_validation_rows_all_epochs_run(manifest, tmp_path, study_config):
    run = train(study_config(without_rows(manifest, "val"), epochs=3, patience=1, stages="2"), tmp_path / "run")
    assert [line["val"] for line in history(run / "stage2")] == [None] * 4
    assert read_checkpoint(run / "stage2/best.safetensors").notes["epoch"] == 3
    assert list(json.loads((run / "metrics.json").read_text())["splits"]) == ["test"]


def test_with_training_rows_alone_there_is_a_model_and_no_metrics(manifest, tmp_path, study_config):
    run = train(study_config(without_rows(manifest, "val", "test"), stages="2"), tmp_path / "run")
    assert (run / "stage2/best.safetensors").exists() and not (run / "metrics.json").exists()


@pytest.mark.parametrize("adapter", ["lora", "loramoe", "frozen", "full"])
@pytest.mark.parametrize("fusion", ["ei", "late"])
def test_ablations_run(manifest, tmp_path, adapter, fusion, study_config):
    config = study_config(manifest)
    model = replace(config.model, adapter=adapter, fusion=fusion)
    assert (train(replace(config, model=model), tmp_path / "run") / "report.html").exists()


@pytest.mark.parametrize("balance", ["off", "oversample", "auto", "weights"])
def test_balance_reaches_the_steps(manifest, tmp_path, study_config, monkeypatch, balance):
    """Of the train rows two thirds of the first class are taken away: 2, 4 and 4 are left."""
    import ei.training as training

    kept = [line for line in manifest.read_text().splitlines(True) if not line.startswith(("train0,", "train3,"))]
    manifest.write_text("".join(kept))
    seen = []
    step = training.Step.__call__

    def remember(self, batches):
        weights = None if self.class_weights is None else self.class_weights.tolist()
        seen.append((sum(map(len, batches)), weights))
        return step(self, batches)

    monkeypatch.setattr(training.Step, "__call__", remember)
    config = study_config(manifest, stages="2")
    chosen = (3.0, 1.0, 0.5) if balance == "weights" else ()
    train(replace(config, data=replace(config.data, balance=balance, class_weights=chosen)), tmp_path / "run")
    assert sum(samples for samples, _ in seen) == (12 if balance == "oversample" else 10)
    weights = {"auto": [pytest.approx(10 / 6), pytest.approx(10 / 12), pytest.approx(10 / 12)], "weights": [3, 1, 0.5]}
    assert seen[0][1] == weights.get(balance)


def test_class_weights_must_fit(manifest, tmp_path, study_config):
    config = study_config(manifest)
    for given, message in [
        ({"balance": "weights"}, "class_weights must be given"),
        ({"class_weights": (1.0, 2.0)}, "balance must be 'weights' with class_weights"),
        ({"balance": "weights", "class_weights": (1.0, -1.0)}, "class_weights must be positive"),
        ({"balance": "weights", "class_weights": (1.0, 1.0)}, "one number for each of dark, grey, light, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(replace(config, data=replace(config.data, **given)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_precisions_train(manifest, tmp_path, study_config, precision):
    run = train(study_config(manifest, precision=precision, stages="2", micro_batch=4), tmp_path / "run")
    (_, line) = history(run / "stage2")
    assert line["loss"]["total"] < 10 and line["memory_gib"] > 0


def test_several_labels_per_sample(manifest, tmp_path, study_config):
    lines = manifest.read_text().splitlines()
    flags = {"dark": "0,0", "grey": "1,0", "light": "1,1"}
    rows = [line.split(",") for line in lines[1:]]
    text = ["id,split,acl,meniscus,cfp,oct"]
    text += [f"{i},{split},{flags[label]},{a},{b}" for i, _, split, label, a, b in rows]
    manifest.write_text("\n".join(text))
    config = study_config(manifest, stages="2")
    run = train(replace(config, data=replace(config.data, labels=("acl", "meniscus"))), tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["multi_label"] and metrics["classes"] == ["acl", "meniscus"]


def test_the_folder_must_be_new_or_of_the_same_run(finished, manifest, study_config):
    before = (finished / "config.yaml").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"begun with other settings: data manifest \(was .*--out"):
        train(study_config(manifest), finished)
    assert (finished / "config.yaml").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="is neither a run nor an empty folder"):
        train(study_config(manifest), manifest.parent)


@pytest.mark.fault("all {split} rows of one class", "refused before anything is trained")
@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_that_cannot_be_measured_are_refused(manifest, tmp_path, study_config, split):
    """With one class only, the mAP that chooses the best epoch would not exist."""
    lines = [line for line in manifest.read_text().splitlines() if f",{split}," not in line or ",grey," in line]
    manifest.write_text("\n".join(lines))
    message = {"train": "no train row is of class dark, light", "val": "the val rows are all alike"}[split]
    with pytest.raises(ValueError, match=message):
        train(study_config(manifest), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("a misspelt label: a class without train rows", "refused before anything is trained")
def test_a_misspelt_class_is_not_a_new_one(manifest, tmp_path, study_config):
    manifest.write_text(manifest.read_text().replace("test,grey", "test,gray", 1))
    with pytest.raises(ValueError, match="no train row is of class gray; is a label misspelt"):
        train(study_config(manifest), tmp_path / "run")


def test_an_untrained_best_epoch_and_random_weights_are_said(manifest, tmp_path, study_config, capsys):
    train(study_config(manifest, lr=1e-12, lr_low=1e-12, stages="2"), tmp_path / "run")
    said = capsys.readouterr().out
    assert "the best mAP was that before the first step" in said
    assert "random weights, and they are frozen" in said
    assert "classes, train/val/test rows: dark 4/2/3, grey 4/2/3, light 4/2/3" in said


def test_faults_come_before_the_folder(manifest, tmp_path, study_config):
    config = study_config(manifest)
    with pytest.raises(ValueError, match="gate_prior must be one of cfp, oct, got 'mri'"):
        train(replace(config, train=replace(config.train, gate_prior="mri")), tmp_path / "run")
    with pytest.raises(ValueError, match="device 'gpu'"):
        train(replace(config, train=replace(config.train, device="gpu")), tmp_path / "run")
    for fields in ({"int_at": 4}, {"int_from": 5}, {"ranks": (0,)}, {"targets": ("nothing*",)}):
        with pytest.raises(ValueError):  # at once, not when stage 2 begins
            train(replace(config, model=replace(config.model, **fields)), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="unknown|timm"):
        train(replace(config, model=replace(config.model, backbone="resnet_of_dreams")), tmp_path / "run")
    next(manifest.parent.glob("*.png")).unlink()
    with pytest.raises(ManifestError, match="row"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Poisoned(nn.Module):
    """Gives NaN, or a finite loss with a gradient that is not."""

    def __init__(self, model, how):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, batch):
        output = self.model(batch)
        logits = output.logits
        # The gradient of sqrt is infinite at zero, its value is not.
        bad = logits * float("nan") if self.how == "loss" else logits + ((logits - logits.detach()) ** 2).sqrt()
        return replace(output, logits=bad)


@pytest.mark.fault("NaN in the loss, an infinite gradient", "stopped before the step, samples named")
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_nothing_that_is_not_finite_reaches_a_weight(manifest, tmp_path, monkeypatch, how, study_config):
    import ei.training as training

    seen = []

    def poisoned(*args, **kwargs):
        seen.append(Poisoned(build(*args, **kwargs), how))
        return seen[-1]

    build = training.build_model
    monkeypatch.setattr(training, "build_model", poisoned)
    monkeypatch.setattr(training.Loop, "validate", lambda *_: {"mAP": 0.0})
    config = study_config(manifest, stages="2")
    config = replace(config, model=replace(config.model, detach_fusion=False))
    with pytest.raises(TrainingError, match="not finite for the samples train"):
        train(config, tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in seen[-1].parameters())


@pytest.mark.fault("an image that vanishes", "stopped, the file named")
def test_a_file_that_vanishes_stops_the_run(manifest, tmp_path, monkeypatch, study_config):
    """It is not replaced by anything: the error names it."""
    import ei.training as training

    read = training.read_manifest

    def read_then_lose(*args, **kwargs):
        table = read(*args, **kwargs)
        (manifest.parent / "train3_oct.png").unlink()
        return table

    monkeypatch.setattr(training, "read_manifest", read_then_lose)
    with pytest.raises(ValueError, match="train3_oct.png"):
        train(study_config(manifest, stages="2"), tmp_path / "run")


@pytest.mark.fault("an image replaced between two epochs", "stopped, the file and its row named")
def test_a_file_that_changes_between_epochs_stops_the_run(manifest, tmp_path, monkeypatch, study_config):
    import ei.training as training

    close = training.Loop._close_epoch

    def close_and_change(self, *args):
        close(self, *args)
        if self.at.epoch == 2:
            Image.new("L", (8, 8), 99).save(manifest.parent / "train3_oct.png")

    monkeypatch.setattr(training.Loop, "_close_epoch", close_and_change)
    with pytest.raises(ValueError, match=r"train3_oct.png: has changed since .* \(row 5, id 'train3'\)"):
        train(study_config(manifest, stages="2", epochs=3), tmp_path / "run")
    assert history(tmp_path / "run/stage2")[-1]["epoch"] == 1


def test_sixteen_bit_images_reach_the_model(manifest, tmp_path, study_config):
    for path in manifest.parent.glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)
    assert (train(study_config(manifest, stages="2"), tmp_path / "run") / "metrics.json").exists()


def test_each_modality_may_have_an_intensity_of_its_own(manifest, tmp_path, study_config, monkeypatch):
    """In the first stage too, where there is only one of them."""
    import ei.data.dataset as dataset

    for path in manifest.parent.glob("*_oct.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)).save(path)
    read, seen = dataset.read_image, set()

    def remember(path, *args, intensity, **kwargs):
        seen.add((path.stem.split("_")[1], str(intensity)))
        return read(path, *args, intensity=intensity, **kwargs)

    monkeypatch.setattr(dataset, "read_image", remember)
    config = study_config(manifest)
    train(replace(config, data=replace(config.data, intensity=("type", "0:255"))), tmp_path / "run")
    assert len(seen) == 2 and {modality for modality, _ in seen} == {"cfp", "oct"}


def test_learning_rate_is_torchs_cyclic_one():
    settings = TrainConfig(lr=1e-3, lr_low=1e-5, cycle_epochs=4, cycle_decay=0.8)
    steps_per_epoch = 7
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.lr_low)
    schedule = torch.optim.lr_scheduler.CyclicLR(
        optimizer,
        base_lr=settings.lr_low,
        max_lr=settings.lr,
        step_size_up=settings.cycle_epochs * steps_per_epoch,
        scale_fn=lambda cycle: settings.cycle_decay ** (cycle - 1),
        scale_mode="cycle",
        cycle_momentum=False,
    )
    for step in range(20 * steps_per_epoch):
        ours = cyclic_learning_rate(step / steps_per_epoch, settings)
        assert ours == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_optimisers():
    parameter = nn.Parameter(torch.zeros(1))
    sgd = make_optimizer([parameter], TrainConfig())
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["weight_decay"]) == (0.95, 1e-4)
    assert isinstance(make_optimizer([parameter], TrainConfig(optimizer="adamw")), torch.optim.AdamW)


def test_stage_1_that_saw_other_images_is_refused(manifest, tmp_path, study_config):
    """The table is the same, but what it calls test images were train images then."""
    run = train(study_config(manifest), tmp_path / "run")
    for name in ("train0_cfp.png", "train0_oct.png"):
        one, other = manifest.parent / name, manifest.parent / name.replace("train", "test")
        held, theirs = one.read_bytes(), other.read_bytes()
        one.write_bytes(theirs)
        other.write_bytes(held)
    with pytest.raises(ValueError, match=r"its content of an image of .*manifest.csv differ"):
        train(study_config(manifest, stage1_from=str(run)), tmp_path / "other")


def test_a_folder_that_cannot_be_made_is_refused_at_once(manifest, tmp_path, study_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists and is not a folder; choose another with --out"):
        train(study_config(manifest), tmp_path / "file/run")
