"""What a ViT reads: size, scale, and the strength of each random change."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ei.config import DataConfig
from ei.data.transforms import RandomSideCrop, ShrinkLarge, evaluation_transform, training_transform

# Neither augmented nor normalised: each test switches on what it is about.
PLAIN = DataConfig(image_size=32, mean=(0, 0, 0), std=(1, 1, 1), rotation=0, crop=0, flip=0, jitter=0)
DEFAULT = DataConfig(image_size=32)


def image(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


def ramp(size: int) -> Tensor:
    """Brightness from 0 at the left to 1 at the right."""
    return torch.linspace(0, 1, size).expand(3, size, size)


def draws(transform: Callable[[Tensor], Tensor], of: Tensor, count: int = 40) -> list[Tensor]:
    torch.manual_seed(0)
    return [transform(of) for _ in range(count)]


@pytest.mark.parametrize("shape", [(32, 32), (7, 5), (1, 1), (64, 40), (33, 100), (200, 150)])
@pytest.mark.parametrize("build", [training_transform, evaluation_transform])
def test_any_size_becomes_the_square(
    build: Callable[[DataConfig], Callable[[Tensor], Tensor]], shape: tuple[int, int]
) -> None:
    for result in draws(build(DEFAULT), image(*shape), count=8):
        assert (result.shape, result.dtype) == ((3, 32, 32), torch.float32)
        assert result.isfinite().all()


def test_evaluation_resizes_and_normalises_and_nothing_else() -> None:
    config = replace(PLAIN, mean=(0.5, 0.25, 0), std=(0.25, 0.5, 1))
    white = evaluation_transform(config)(torch.ones(3, 48, 20))
    torch.testing.assert_close(white, torch.tensor([2, 1.5, 1]).view(3, 1, 1).expand(3, 32, 32))
    same_size = image(32, 32)
    assert torch.equal(evaluation_transform(PLAIN)(same_size), same_size)


def test_shrinking_is_antialiased() -> None:
    lines = (torch.arange(256) % 8 == 0).float().expand(3, 256, 256)
    assert evaluation_transform(PLAIN)(lines)[..., 1:-1].sub(1 / 8).abs().max() < 0.02


def test_strengths_of_zero_leave_evaluation() -> None:
    for shape in ((32, 32), (40, 50), (300, 200)):
        expected = evaluation_transform(PLAIN)(image(*shape))
        assert all(torch.equal(result, expected) for result in draws(training_transform(PLAIN), image(*shape), 8))


@pytest.mark.parametrize("field", ["rotation", "crop", "flip", "jitter"])
def test_each_strength_switches_its_part_on(field: str) -> None:
    config = replace(PLAIN, **{field: getattr(DataConfig(), field)})
    results = draws(training_transform(config), image(32, 32))
    assert any(not torch.equal(result, image(32, 32)) for result in results)


def test_values_stay_in_range_before_they_are_normalised() -> None:
    config = replace(DEFAULT, mean=(0, 0, 0), std=(1, 1, 1), jitter=0.9)
    for shape in ((32, 32), (50, 90), (200, 150)):
        extremes = image(*shape).round()
        stack = torch.stack(draws(training_transform(config), extremes))
        assert stack.min() >= -1e-6
        assert stack.max() <= 1 + 1e-6


def test_rotation_is_within_its_angle_and_uncovers_black() -> None:
    config = replace(PLAIN, rotation=30, image_size=65)
    results = draws(training_transform(config), ramp(65))
    angles = []
    for result in results:
        centre = result[0, 28:37, 28:37]
        down, right = (centre[1:] - centre[:-1]).mean(), (centre[:, 1:] - centre[:, :-1]).mean()
        angles.append(torch.rad2deg(torch.atan2(down, right)).item())
    assert max(map(abs, angles)) <= 31
    assert min(angles) < -15
    assert max(angles) > 15
    assert all(result[:, 0, -1].max() < 0.05 for result, angle in zip(results, angles, strict=True) if abs(angle) > 10)


def test_a_flip_mirrors_left_and_right_as_often_as_asked() -> None:
    for probability, low, high in ((1.0, 1.0, 1.0), (0.5, 0.35, 0.65)):
        results = draws(training_transform(replace(PLAIN, flip=probability)), ramp(32), 200)
        flipped = [torch.equal(result, ramp(32).flip(-1)) for result in results]
        assert all(flip or torch.equal(result, ramp(32)) for flip, result in zip(flipped, results, strict=True))
        assert low <= sum(flipped) / len(flipped) <= high


def test_jitter_scales_brightness_within_its_strength() -> None:
    grey = torch.full((3, 32, 32), 0.5)
    levels = [result.mean().item() for result in draws(training_transform(replace(PLAIN, jitter=0.3)), grey, 200)]
    assert 0.35 - 1e-6 <= min(levels) < 0.4
    assert 0.6 < max(levels) <= 0.65 + 1e-6


def test_a_crop_cuts_each_side_on_its_own_half_of_the_time() -> None:
    position = torch.arange(100 * 200.0).view(1, 100, 200).expand(3, -1, -1)
    crops = draws(RandomSideCrop(0.1), position, 400)
    cuts = []
    for crop in crops:
        top, left = divmod(int(crop[0, 0, 0]), 200)
        bottom, right = divmod(int(crop[0, -1, -1]), 200)
        cuts.append((top, 99 - bottom, left, 199 - right))
    shares = torch.tensor(cuts) / torch.tensor([100, 100, 200, 200])
    assert shares.max() < 0.1
    assert (shares.max(dim=0).values > 0.08).all()
    untouched = (shares == 0).all(dim=1).float().mean()
    assert 0.42 < untouched < 0.58
    assert torch.corrcoef(shares[shares.any(dim=1)].T).fill_diagonal_(0).abs().max() < 0.25


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2)])
def test_a_crop_leaves_something_of_the_smallest_image(shape: tuple[int, int]) -> None:
    assert all(crop.numel() > 0 for crop in draws(RandomSideCrop(0.499), image(*shape), 100))


def test_large_images_are_shrunk_with_their_aspect_and_others_left_alone() -> None:
    assert ShrinkLarge(40)(image(100, 50)).shape == (3, 80, 40)
    for shape in ((300, 40), (30, 20)):
        assert torch.equal(ShrinkLarge(40)(image(*shape)), image(*shape))


def test_the_same_seed_gives_the_same_image() -> None:
    transform = training_transform(DEFAULT)
    first, again = draws(transform, image(40, 50), 3), draws(transform, image(40, 50), 3)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
