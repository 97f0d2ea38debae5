from __future__ import annotations

import itertools

import pytest
import torch

from flexpert.train.config import DataConfig
from flexpert.train.data import ImageDataset
from flexpert.train.images import ImageBatches

PLAIN = DataConfig(shift=0, flip=False)


def dataset(count: int = 50) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count)
    return ImageDataset(
        train_images=images,
        train_labels=labels,
        test_images=images[:5],
        test_labels=labels[:5],
        source="here",
    )


def batches(config: DataConfig = PLAIN, batch_size: int = 8, seed: int = 0) -> ImageBatches:
    return ImageBatches(dataset(), config, image_size=32, batch_size=batch_size, seed=seed)


def test_an_epoch_shows_each_image_once_and_the_next_one_in_another_order() -> None:
    source = batches(batch_size=10)
    assert source.steps_per_epoch == 5
    first = torch.cat([source.train(step)[1] for step in range(5)])
    second = torch.cat([source.train(step)[1] for step in range(5, 10)])
    assert first.sort().values.equal(torch.arange(50))
    assert second.sort().values.equal(torch.arange(50))
    assert not first.equal(second)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    config = DataConfig(shift=2, flip=True)
    one, two = batches(config), batches(config)
    for step in (0, 1, 7):
        one.train(step)
    for step in (9, 3, 9):
        assert all(a.equal(b) for a, b in zip(one.train(step), two.train(step), strict=True))
    assert not one.train(3)[0].equal(batches(config, seed=1).train(3)[0])


def test_images_are_normalised_and_padded_with_black() -> None:
    source = batches()
    data = dataset()
    x = source.evaluation(data.train_images)
    assert x.shape == (50, 1, 32, 32)
    inner = x[:, :, 2:30, 2:30]
    assert abs(float(inner.mean())) < 1e-5
    assert abs(float(inner.std()) - 1) < 1e-4
    black = source.evaluation(torch.zeros(1, 28, 28, dtype=torch.uint8))
    torch.testing.assert_close(x[:, :, :2].unique(), black.unique())


def test_augmented_images_are_shifted_and_mirrored_copies() -> None:
    config = DataConfig(shift=2, flip=True)
    source, plain = batches(config), batches()
    images, labels = source.train(0)
    originals, same_labels = plain.train(0)
    assert labels.equal(same_labels)
    seen = set()
    for image, original in zip(images, originals, strict=True):
        matches = [
            (flip, dy, dx)
            for flip in (False, True)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if image.equal(torch.roll(original.flip(2) if flip else original, (dy, dx), (1, 2)))
        ]
        assert len(matches) == 1  # the two black pixels around the image make a shift of two a roll
        seen.add(matches[0])
    assert len(seen) > 1


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 3, 3, 7, 8), (0, 0, 8)])
def test_parts_of_a_batch_are_augmented_as_in_the_whole(cuts: tuple[int, ...]) -> None:
    source = batches(DataConfig(shift=2, flip=True))
    images, labels = source.train(9)
    parts = [source.train(9, part) for part in itertools.pairwise(cuts)]
    assert torch.cat([part[0] for part in parts]).equal(images)
    assert torch.cat([part[1] for part in parts]).equal(labels)
