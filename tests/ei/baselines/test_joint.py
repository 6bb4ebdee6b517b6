"""One space for all modalities: contrastive loss, retrieval, classes without a classifier."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.retrieval import RetrievalRecall

from ei.baselines.joint import Temperature, class_prototypes, contrastive_loss, recall_at_k, retrieve, zero_shot


def units(count: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_loss_is_open_clips(count: int) -> None:
    open_clip = pytest.importorskip("open_clip")
    one, other, scale = units(count, 5, 0), units(count, 5, 1), torch.tensor(14.3)
    expected = open_clip.loss.ClipLoss()(one, other, scale)
    torch.testing.assert_close(contrastive_loss(one, other, scale).mean(), expected)


@pytest.mark.parametrize("count", [2, 8, 64])
def test_embeddings_that_are_equally_similar_cost_ln_b(count: int) -> None:
    """Exactly where all similarities are zero; nearly for random ones of a large width at scale 1."""
    basis = torch.eye(2 * count)
    losses = contrastive_loss(basis[:count], basis[count:], 1 / 0.07)
    torch.testing.assert_close(losses, torch.full((count,), math.log(count)))
    random = contrastive_loss(units(count, 100_000, 0), units(count, 100_000, 1), 1.0).mean()
    assert float(random) == pytest.approx(math.log(count), abs=0.01)


def test_partners_cost_nothing_and_strangers_much() -> None:
    one = torch.eye(4)
    assert float(contrastive_loss(one, one, 100.0).max()) < 1e-6
    assert float(contrastive_loss(one, one.roll(1, 0), 100.0).min()) > 99


def test_who_lacks_one_is_nobodys_negative() -> None:
    one, other, there = units(5, 4, 0), units(5, 4, 1), torch.tensor([True, False, True, True, False])
    losses = contrastive_loss(one, other, 10.0, there)
    torch.testing.assert_close(losses[there], contrastive_loss(one[there], other[there], 10.0))
    assert losses[~there].tolist() == [0, 0]
    nobody = contrastive_loss(one.requires_grad_(), other, 10.0, torch.zeros(5, dtype=torch.bool))
    nobody.sum().backward()
    assert not nobody.any() and one.grad is not None and not one.grad.any()


def test_the_temperature_is_bounded() -> None:
    assert Temperature(0.07)().item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert Temperature(1e-9)().item() == pytest.approx(100, rel=1e-5)


def test_retrieval_is_torchmetrics() -> None:
    query, gallery = torch.randn(12, 3), torch.randn(12, 3)
    # Above zero: torchmetrics counts nothing else as found.
    scores = F.cosine_similarity(query[:, None], gallery[None], dim=-1) + 2
    for k in (1, 3, 12):
        theirs = RetrievalRecall(top_k=k)(
            scores.flatten(), torch.eye(12, dtype=torch.bool).flatten(), torch.arange(12).repeat_interleave(12)
        )
        assert recall_at_k(query, gallery, k) == pytest.approx(float(theirs))
        assert torch.equal(retrieve(query, gallery, k), scores.argsort(dim=1, descending=True)[:, :k])
    assert recall_at_k(query, 3 * query, 1) == 1.0


@pytest.mark.parametrize("k", [0, 3])
def test_more_than_the_gallery_has(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 1 and the 2 items of the gallery, got {k}"):
        retrieve(torch.eye(2), torch.eye(2), k)


def test_prototypes_are_means_and_classify_by_cosine() -> None:
    embeddings, labels = torch.randn(9, 4), torch.arange(9) % 3
    prototypes = class_prototypes(embeddings, labels, 3)
    expected = torch.stack([embeddings[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(prototypes, F.normalize(expected, dim=-1))
    torch.testing.assert_close(class_prototypes(embeddings, F.one_hot(labels).float(), 3), prototypes)
    torch.testing.assert_close(
        zero_shot(embeddings, prototypes), F.cosine_similarity(embeddings[:, None], prototypes[None], dim=-1)
    )
    with pytest.raises(ValueError, match="every class must have a sample, these have none: 3"):
        class_prototypes(embeddings, labels, 4)


def test_the_model_s_loss_is_the_mean_over_pairs(build, make_batch) -> None:
    model = build("joint", ("cfp", "faf", "oct"), joint_weight=0.5)
    batch = make_batch(cfp=(1, 1, 1, 0), faf=(1, 1, 0, 0), oct=(1, 1, 1, 1))
    a, b, c = model.embed(batch).unbind(1)
    torch.testing.assert_close(a.norm(dim=-1), torch.ones(4))
    scale, two, three = model.temperature(), torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    ab, bc = contrastive_loss(a[two], b[two], scale), contrastive_loss(b[two], c[two], scale)
    ac = contrastive_loss(a[three], c[three], scale)
    expected = torch.stack([*(ab + bc + ac[:2]) / 3, ac[2], torch.tensor(0.0)]) / 2
    torch.testing.assert_close(model(batch).penalties["contrastive"], expected)


def test_the_classifier_reads_the_mean_of_units(build, make_batch) -> None:
    model, batch = build("joint"), make_batch(cfp=(1, 1), oct=(1, 0))
    one, other = model.embed(batch).unbind(1)
    mean = torch.stack([(one[0] + other[0]) / 2, one[1]])
    torch.testing.assert_close(model(batch).logits, model.head(4 * mean))  # the width is 16


def test_units_are_fp32_in_narrow_arithmetic(build, make_batch) -> None:
    model = build("joint").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        units = model.embed(make_batch(cfp=(1, 1), oct=(1, 1)))
    assert units.dtype == torch.float32
    torch.testing.assert_close(units.norm(dim=-1), torch.ones(2, 2))


def test_identical_modalities_find_each_other(build, make_batch) -> None:
    """With one ViT and one projection for both, and the same images, every query finds its own at once."""
    model = build("joint").eval()
    model.encoders["modality_oct"].backbone = model.encoders["modality_cfp"].backbone
    model.fusion["modality_oct"] = model.fusion["modality_cfp"]
    batch = make_batch(cfp=(1,) * 6, oct=(1,) * 6)
    same = type(batch)(images=dict.fromkeys(batch.images, batch.images["cfp"]), present=batch.present)
    one, other = model.embed(same).unbind(1)
    assert recall_at_k(one, other, 1) == 1.0
