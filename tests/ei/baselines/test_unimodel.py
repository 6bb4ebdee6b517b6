"""One sequence of the patches of all images."""

import pytest
import torch

from ei.config import ModelConfig
from ei.data.sample import Batch
from ei.models import load_backbone


def by_hand(backbone, images: torch.Tensor, added: torch.Tensor | float = 0.0) -> torch.Tensor:
    """(S, 3, H, W) of one sample, and (S, 1, D) for the patches of each -> CLS (1, D), with timm's own parts."""
    vit = backbone.vit
    each = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    prefix = vit.num_prefix_tokens
    x = torch.cat([each[:1, :prefix], (each[:, prefix:] + added).flatten(0, 1)[None]], dim=1)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)[:, 0]


@pytest.mark.parametrize("embeddings", [False, True])
def test_it_is_one_sequence(build, make_batch, embeddings: bool) -> None:
    model = build("unimodel", unimodel_embeddings=embeddings)
    batch = make_batch(cfp=(1, 0), oct=(2, 1))
    kinds = torch.randn(2, 64) if embeddings else torch.zeros(2, 64)
    if embeddings:
        with torch.no_grad():
            model.embeddings.weight.copy_(kinds)
    output = model(batch).logits
    for row in range(2):
        images = torch.cat([batch.images[name][row][batch.present[name][row]] for name in ("cfp", "oct")])
        added = kinds[[0, 1, 1] if row == 0 else [1]][:, None]
        expected = model.head(by_hand(model.encoder.backbone, images, added))
        torch.testing.assert_close(output[[row]], expected, rtol=1e-4, atol=1e-5)


def test_embeddings_start_as_nothing(build) -> None:
    assert not build("unimodel").embeddings.weight.any()


def test_registers_are_there_once() -> None:
    settings = ModelConfig(backbone="vit_small_patch14_reg4_dinov2", pretrained=False)
    backbone = load_backbone(settings, 28)
    images = torch.randn(3, 3, 28, 28)
    tokens = backbone.patch_tokens(images[1:])
    assert tokens.shape == (2, 4, 384)
    torch.testing.assert_close(backbone(images[:1], tokens.flatten(0, 1)[None]), by_hand(backbone, images))


def test_embeddings_tell_modalities_apart(build, make_batch) -> None:
    model, batch = build("unimodel"), make_batch(cfp=(1, 1), oct=(1, 0))
    swapped = Batch(
        images={"cfp": batch.images["oct"], "oct": batch.images["cfp"]},
        present={"cfp": batch.present["oct"], "oct": batch.present["cfp"]},
    )
    torch.testing.assert_close(model(batch).logits, model(swapped).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.embeddings.weight.normal_()
    difference = (model(batch).logits - model(swapped).logits).abs().amax(1)
    assert (difference > 1e-4).all()
