"""A transformer over a modality's images, and one over the modalities."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ei import evaluate, predict, train
from ei.baselines.raddiag import SetTransformer
from ei.comparison.plan import make_plan
from ei.config import BaselineConfig
from ei.data.dataset import Draw, ManifestDataset
from ei.data.manifest import read_manifest


def test_a_set_has_no_order_and_a_sequence_has() -> None:
    items, there = torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, True, False, True]])
    order = torch.tensor([2, 0, 3, 1])
    for positions in (0, 4):
        transformer = SetTransformer(8, layers=2, heads=2, positions=positions)
        one, other = transformer(items, there), transformer(items[:, order], there[:, order])
        assert torch.allclose(one, other, atol=1e-5) == (positions == 0)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_there_is_not_seen(training: bool) -> None:
    transformer = SetTransformer(8, layers=1, heads=1, positions=4).train(training)
    items, there = torch.randn(2, 3, 8), torch.tensor([[True, True, False], [False, False, False]])
    with torch.set_grad_enabled(training):
        found = transformer(items, there)
        torch.testing.assert_close(found[:1], transformer(items[:1, :2], there[:1, :2]))
        torch.testing.assert_close(found[1:], transformer(items[1:, :0], there[1:, :0]))


def by_hand(transformer: SetTransformer, items: Tensor) -> Tensor:
    """(n, D) of one sample -> (D,): a pre-norm transformer with ReLU, layer by layer."""
    x = torch.cat([transformer.cls[None], items])
    if transformer.positions is not None:
        x = x + transformer.positions[: len(x)]
    for layer in transformer.layers.layers:
        y = layer.norm1(x)
        x = x + layer.self_attn(y, y, y)[0]
        x = x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
    return transformer.layers.norm(x)[0]


@pytest.mark.parametrize("training", [True, False])
def test_it_is_its_formula(build, make_batch, training: bool) -> None:
    model, batch = build("raddiag").train(training), make_batch(cfp=(1, 2), oct=(3, 0))
    expected = []
    for row, names in enumerate((("cfp", "oct"), ("cfp",))):
        volumes = [
            by_hand(model.of_images, model.encoder(name).by_image(batch)[row][batch.present[name][row]])
            + model.embeddings.weight[("cfp", "oct").index(name)]
            for name in names
        ]
        first, _, last = model.head
        expected.append(last(nn.functional.gelu(first(by_hand(model.fusion, torch.stack(volumes))))))
    torch.testing.assert_close(model(batch).logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    heads = [[layer.self_attn.num_heads for layer in part.layers.layers] for part in (model.of_images, model.fusion)]
    assert heads == [[1], [4, 4]]


def test_matrices_start_as_xavier_s() -> None:
    layer = SetTransformer(64, layers=1, heads=1).layers.layers[0]
    for matrix, fans in ((layer.linear1.weight, 128), (layer.self_attn.in_proj_weight, 256)):
        assert 0.95 * math.sqrt(6 / fans) < matrix.abs().max() <= math.sqrt(6 / fans)


def test_images_and_modalities_beyond_the_tables(build, make_batch) -> None:
    with pytest.raises(
        ValueError, match="raddiag_slices must be at least the number of images of a modality, 3, got 2"
    ):
        build("raddiag", raddiag_slices=2)(make_batch(cfp=(3,), oct=(1,)))
    with pytest.raises(ValueError, match="raddiag_table must have a row for each of 2 modalities, got 1"):
        build("raddiag", raddiag_table=1)


def test_modalities_are_told_apart(build, make_batch) -> None:
    model = build("raddiag").eval()
    model.encoders["modality_oct"].backbone = model.encoders["modality_cfp"].backbone
    batch = make_batch(cfp=(1,), oct=(1,))
    swapped = type(batch)(images={"cfp": batch.images["oct"], "oct": batch.images["cfp"]}, present=batch.present)
    assert not torch.allclose(model(batch).logits, model(swapped).logits, atol=1e-4)
    with torch.no_grad():
        model.embeddings.weight.zero_()
    torch.testing.assert_close(model(batch).logits, model(swapped).logits)


@pytest.fixture
def with_volume(manifest: Path) -> Path:
    """Of the second row, cfp is two photos; of the third, oct is a volume and a photo."""
    np.save(manifest.with_name("volume.npy"), np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8))
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(manifest.with_name("more.png"))
    text = manifest.read_text().replace("train1_cfp.png", "train1_cfp.png;more.png")
    manifest.write_text(text.replace("train2_oct.png", "volume.npy;train2_oct.png"))
    return manifest


@pytest.mark.parametrize(("images", "counts"), [("mean", [1, 2, 5]), ("one", [1, 1, 4])])
def test_images_of_a_sample_are_counted_as_they_are_loaded(with_volume: Path, study_config, images, counts) -> None:
    config = study_config(with_volume).data
    config = replace(config, images=images)
    table = read_manifest(with_volume, config)
    rows = table.rows[:3]
    dataset = ManifestDataset(rows, config, multi_label=False, classes=table.classes, train=True, seed=0)
    found = [[row.count_images(modality, config) for modality in ("cfp", "oct")] for row in rows]
    assert [max(pair) for pair in found] == counts
    seen = [[dataset[Draw(row, epoch)].images for epoch in range(20)] for row in range(3)]
    most = [[max(len(images[name]) for images in each) for name in ("cfp", "oct")] for each in seen]
    assert most == found


@pytest.mark.fault("more images of a sample than RadDiag has positions", "refused before training and prediction")
def test_too_few_positions_are_said_before_training(with_volume: Path, study_config, tmp_path) -> None:
    config = study_config(with_volume)
    few = BaselineConfig(raddiag_slices=4, raddiag_heads=1)
    config = replace(config, model=replace(config.model, fusion="raddiag"), baseline=few)
    where = "5 (oct of row 4, id 'train2'), got 4"
    message = re.escape(f"raddiag_slices must be at least the number of images of a modality, {where}")
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        make_plan(config, ["raddiag"], seeds=1, out=tmp_path / "out")
    assert not (tmp_path / "run").exists()
    rows = with_volume.read_text().splitlines(True)
    alone = with_volume.with_name("train.csv")
    alone.write_text("".join(row for row in rows if row.startswith(("id", "train")) and "volume" not in row))
    run = train(replace(config, data=replace(config.data, manifest=str(alone))), tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        predict(run, with_volume, tmp_path / "p.csv")
    other = with_volume.with_name("other.csv")
    other.write_text(rows[0] + "other0,other0,test,dark,test0_cfp.png,volume.npy;more.png\n")
    with pytest.raises(ValueError, match="5 .oct of row 2, id 'other0'."):
        evaluate(run, other, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
