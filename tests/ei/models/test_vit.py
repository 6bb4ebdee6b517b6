"""What every backbone promises, on the tiny one."""

import copy

import pytest
import torch

from ei.models.vit import Backbone


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(3, 2, 64)


def test_summary_is_the_class_token_after_the_final_norm(trunk: Backbone, images: torch.Tensor) -> None:
    assert torch.equal(trunk(images), trunk.vit.forward_features(images)[:, 0])


def test_tokens_change_the_summary(trunk: Backbone, images: torch.Tensor, tokens: torch.Tensor) -> None:
    assert (trunk(images, tokens) - trunk(images)).abs().max() > 1e-3


def test_each_image_sees_its_own_tokens_only(trunk: Backbone, images: torch.Tensor, tokens: torch.Tensor) -> None:
    other = tokens.clone()
    other[1] += 1
    changed = (trunk(images, tokens) != trunk(images, other)).any(1)
    assert changed.tolist() == [False, True, False]


def test_order_and_place_of_tokens_do_not_matter(trunk: Backbone, images: torch.Tensor, tokens: torch.Tensor) -> None:
    trunk, images, tokens = trunk.double(), images.double(), tokens.double()
    here = trunk(images, tokens)
    torch.testing.assert_close(trunk(images, tokens.flip(1)), here, rtol=0, atol=1e-12)
    trunk._insert = lambda x, tokens: torch.cat([x, tokens], dim=1)  # type: ignore[method-assign]
    torch.testing.assert_close(trunk(images, tokens), here, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", range(4))
def test_tokens_enter_directly_before_the_block(
    trunk: Backbone, images: torch.Tensor, tokens: torch.Tensor, block: int
) -> None:
    lengths = []
    for each in trunk.vit.blocks:
        each.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    trunk(images, tokens, tokens_at=block)
    assert lengths == [17] * block + [19] * (4 - block)


def test_tokens_are_not_given_a_position_or_normed(trunk: Backbone, images: torch.Tensor, tokens: torch.Tensor) -> None:
    seen = []
    trunk.vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trunk(images, tokens)
    assert torch.equal(seen[0][:, 1:3], tokens)


def test_summaries_of_several_blocks_come_from_one_pass(trunk: Backbone, images: torch.Tensor) -> None:
    passes = []
    trunk.vit.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    second, last, again = trunk(images, read_from=(2, 0, 4))
    assert len(passes) == 1
    assert torch.equal(second, trunk(images, read_from=2))
    assert torch.equal(last, trunk(images)) and torch.equal(again, last)
    assert not torch.equal(second, last)


def test_early_summary_is_normed_and_skips_later_blocks(trunk: Backbone, images: torch.Tensor) -> None:
    ran = []
    for number, block in enumerate(trunk.vit.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    summary = trunk(images, read_from=2)
    assert ran == [1, 2]
    # The final norm of a fresh ViT has weight 1 and bias 0.
    torch.testing.assert_close(summary.mean(1), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(summary.var(1, unbiased=False), torch.ones(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_at": 4}, r"blocks 0\.\.3, got 4"),
        ({"tokens_at": -1}, r"blocks 0\.\.3, got -1"),
        ({"read_from": 5}, r"blocks 1\.\.4, or 0 for the last, got 5"),
        ({"read_from": -1}, "got -1"),
        ({"tokens": torch.zeros(3, 2, 65)}, r"tokens must be \(3, n, 64\), got \(3, 2, 65\)"),
        ({"tokens": torch.zeros(2, 2, 64)}, r"tokens must be \(3, n, 64\), got \(2, 2, 64\)"),
        ({"tokens": torch.zeros(3, 64)}, r"got \(3, 64\)"),
        ({"tokens": torch.zeros(3, 1, 64), "tokens_at": 2, "read_from": 2}, "enter before the block"),
    ],
)
def test_bad_positions_and_tokens(trunk: Backbone, images: torch.Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trunk(images, **arguments)


@pytest.mark.parametrize("shape", [(3, 3, 8, 9), (3, 3, 16, 16), (3, 1, 8, 8), (3, 8, 8)])
def test_bad_images(trunk: Backbone, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(N, 3, 8, 8\), got"):
        trunk(torch.zeros(shape))


def test_frozen_backbone_passes_gradient_to_tokens_only(
    trunk: Backbone, images: torch.Tensor, tokens: torch.Tensor
) -> None:
    trunk(images, tokens.requires_grad_())[:, 0].sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().max() > 1e-4
    assert all(parameter.grad is None for parameter in trunk.parameters())


def test_fork_shares_what_is_frozen_and_copies_what_is_trained(trunk: Backbone, images: torch.Tensor) -> None:
    trunk.vit.norm.requires_grad_(True)
    trunk.register_buffer("scale", torch.ones(2))
    fork = trunk.fork()
    assert fork.scale is trunk.scale
    for name, parameter in trunk.named_parameters():
        twin = fork.get_parameter(name)
        assert (twin is parameter) == (not name.startswith("vit.norm.")), name
        assert twin.requires_grad == parameter.requires_grad
    before = trunk(images)
    with torch.no_grad():
        fork.vit.norm.weight.mul_(2)
    assert torch.equal(trunk(images), before) and not torch.equal(fork(images), before)


def test_forks_stay_shared_when_moved(trunk: Backbone) -> None:
    both = torch.nn.ModuleList([trunk.fork(), trunk.fork()]).double()
    first, second = (dict(fork.named_parameters()) for fork in both)
    assert all(first[name] is second[name] and first[name].dtype == torch.float64 for name in first)


def test_fork_differs_from_a_deep_copy(trunk: Backbone) -> None:
    copied = copy.deepcopy(trunk)
    assert all(copied.get_parameter(name) is not parameter for name, parameter in trunk.named_parameters())
