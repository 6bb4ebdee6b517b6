"""Prompts, and SAM's two-way transformer between modalities."""

import sys

import pytest
import torch

from ei.baselines.mmrad import PromptNet

pytest.importorskip("transformers")


def test_the_decoder_comes_with_the_paper_s_number_of_parameters() -> None:
    from ei.baselines.mmrad import Decoder
    from ei.config import BaselineConfig

    with torch.device("meta"):
        decoder = Decoder(768, BaselineConfig())
    assert sum(item.numel() for item in decoder.transformer.parameters()) == 9_063_296


def test_the_task_token_asks_first_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are the others' tokens without positions, which they have from their ViTs."""
    from ei.baselines.mmrad import Decoder
    from ei.config import BaselineConfig

    decoder = Decoder(8, BaselineConfig(mmrad_heads=2, mmrad_mlp=16))
    target, others, answers = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 1, 4, 8)

    def transformer(queries, keys, positions, *, attention_similarity):
        assert torch.equal(queries[:, 0], torch.cat([decoder.task.expand(2, 1, 8), target], dim=1))
        assert torch.equal(keys[..., 0].mT, others) and not positions.any() and attention_similarity is None
        return answers, keys

    monkeypatch.setattr(decoder.transformer, "forward", transformer)
    assert torch.equal(decoder(target, others), answers[:, 0, 0])


def test_prompts_are_their_formula_and_reach_every_block(trunk_of) -> None:
    backbone = trunk_of(9)  # 8 patches a side of 2 px, 7 px of padding
    net, images = PromptNet(backbone, 5), torch.randn(2, 3, 9, 9)
    prompts = net(images)
    assert [tuple(prompt.shape) for prompt in prompts] == [(2, backbone.patches, 64)] * 4
    patches = net.patches(backbone._pad(images)).flatten(2).mT
    torch.testing.assert_close(prompts[2], net.up(torch.nn.functional.gelu(net.of_block[2](patches))))
    plain = backbone.features(images)[1]
    for block in range(4):
        only = [prompt if index == block else torch.zeros_like(prompt) for index, prompt in enumerate(prompts)]
        assert (backbone.features(images, only)[1] - plain).abs().max() > 1e-3
        # as if added by hand to what timm's block is given
        hook = backbone.vit.blocks[block].register_forward_pre_hook(
            lambda _, given, added=prompts[block]: torch.cat([given[0][:, :1], given[0][:, 1:] + added], dim=1)
        )
        expected = backbone.features(images)
        hook.remove()
        for one, other in zip(backbone.features(images, only), expected, strict=True):
            torch.testing.assert_close(one, other)
    zero = [torch.zeros_like(prompt) for prompt in prompts]
    assert torch.equal(backbone.features(images, zero)[1], plain)


def test_prompts_are_optional(build, make_batch) -> None:
    model = build("mmrad", mmrad_prompts=False, mmrad_prompt_width=48)
    assert not list(model.prompts.parameters())
    assert model(make_batch(cfp=(1,), oct=(1,))).logits.isfinite().all()


def test_frozen_vits_learn_by_prompts_alone(build, make_batch) -> None:
    model = build("mmrad", adapter="frozen")
    model(make_batch(cfp=(1,), oct=(1,))).logits.sum().backward()
    assert all(item.grad is None for item in model.encoders.parameters())
    assert all(item.grad is not None and item.grad.any() for item in model.prompts.parameters())


def test_a_target_without_others_looks_at_itself(build, make_batch) -> None:
    model, batch = build("mmrad"), make_batch(cfp=(1,), oct=(0,))
    patches = model.maps(batch)[:, 0]
    torch.testing.assert_close(model(batch).logits, model.head(model.fusion(patches, patches)))


def test_each_modality_is_the_target_in_turn(build, make_batch) -> None:
    model, batch = build("mmrad"), make_batch(cfp=(1,), oct=(1,))
    a, b = model.maps(batch).unbind(1)
    expected = model.head((model.fusion(a, b) + model.fusion(b, a)) / 2)
    torch.testing.assert_close(model(batch).logits, expected)
    assert not torch.allclose(model.fusion(a, b), model.fusion(b, a), atol=1e-3)


def test_without_transformers_the_message_says_what_to_install(build, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"fusion 'mmrad' needs 'transformers.*': pip install 'mixture-of-ranks\[peft\]'"
    ):
        build("mmrad")
