"""Samples side by side: what collate pads, and what says so."""

import pytest
import torch

from ei.data.sample import Batch, Sample, collate


def sample(id_: str, label: torch.Tensor | None = None, **counts: int) -> Sample:
    images = {modality: torch.rand(count, 3, 4, 5) for modality, count in counts.items()}
    return Sample(id=id_, images=images, label=label)


def test_each_modality_is_padded_with_zeros_to_its_own_largest_count() -> None:
    samples = [sample("a", oct=1, cfp=2), sample("b", oct=3, cfp=2)]
    batch = collate(samples)
    assert batch.images["oct"].shape == (2, 3, 3, 4, 5)
    assert batch.images["cfp"].shape == (2, 2, 3, 4, 5)
    assert torch.equal(batch.images["oct"][0, :1], samples[0].images["oct"])
    assert torch.equal(batch.images["oct"][1], samples[1].images["oct"])
    assert not batch.images["oct"][0, 1:].any()


def test_present_says_which_images_are_real() -> None:
    batch = collate([sample("a", oct=1, cfp=2), sample("b", oct=3, cfp=2)])
    assert batch.present["oct"].tolist() == [[True, False, False], [True, True, True]]
    assert batch.present["cfp"].all()
    assert batch.present["oct"].dtype == torch.bool


@pytest.mark.parametrize(
    ("labels", "shape", "dtype"),
    [
        ([torch.tensor(1), torch.tensor(0)], (2,), torch.int64),
        ([torch.tensor([1.0, 0, 1]), torch.tensor([0.0, 0, 0])], (2, 3), torch.float32),
    ],
)
def test_labels_are_stacked_in_the_order_of_the_samples(
    labels: list[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch = collate([sample(id_, label, oct=1) for id_, label in zip("ab", labels, strict=True)])
    assert batch.labels is not None
    assert (batch.labels.shape, batch.labels.dtype) == (shape, dtype)
    assert torch.equal(batch.labels[0], labels[0])
    assert (batch.ids, len(batch)) == (["a", "b"], 2)


def test_without_labels_a_batch_has_none() -> None:
    batch = collate([sample("a", oct=1)])
    assert batch.labels is None
    assert batch.to("cpu").labels is None


def test_a_modality_that_a_sample_lacks_has_no_image_that_is_real() -> None:
    batch = collate([sample("a", oct=0, cfp=2), sample("b", oct=3, cfp=0)])
    assert batch.present["oct"].tolist() == [[False] * 3, [True] * 3]
    assert (batch.has("oct").tolist(), batch.has("cfp").tolist()) == ([False, True], [True, False])
    assert batch.has_each(["cfp", "oct"]).tolist() == [[True, False], [False, True]]
    nobody = collate([sample("a", oct=0, cfp=1), sample("b", oct=0, cfp=1)])
    assert nobody.images["oct"].shape == (2, 1, 3, 4, 5) and not nobody.present["oct"].any()


@pytest.mark.fault("a sample without any image reaches a model", "refused, the samples named")
def test_a_sample_without_any_image_is_named() -> None:
    batch = collate([sample("a", oct=0, cfp=0), sample("b", oct=1, cfp=0)])
    with pytest.raises(ValueError, match="must have an image of modality 'cfp' or 'oct', these have none: a$"):
        batch.has_each(["cfp", "oct"])
    with pytest.raises(ValueError, match=r"images of modality 'mri', it has those of \['oct', 'cfp'\]"):
        batch.has("mri")


def test_to_moves_every_tensor_and_keeps_the_ids() -> None:
    batch = collate([sample("a", torch.tensor(1), oct=2)]).to("meta")
    assert isinstance(batch, Batch)
    assert batch.labels is not None
    tensors = [*batch.images.values(), *batch.present.values(), batch.labels]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.ids == ["a"]


def test_a_batch_is_labelled_as_a_whole():
    images = {"oct": torch.zeros(1, 3, 2, 2)}
    samples = [Sample("known", images, torch.tensor(1)), Sample("unknown", images)]
    with pytest.raises(ValueError, match="all have a label, or none; unknown have none"):
        collate(samples)
