"""Batches of images as a function of (seed, step): a resumed run sees what the uninterrupted one would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.core.seeding import derive_seed

from .config import DataConfig
from .data import ImageDataset


class ImageBatches:
    """Shuffled, augmented, normalised batches.

    Args:
        dataset: the images.
        config: augmentation.
        image_size: height and width of a model's input; smaller images are padded with zeros around.
        batch_size: images in a training batch.
        seed: of order and augmentation.
    """

    def __init__(
        self, dataset: ImageDataset, config: DataConfig, *, image_size: int, batch_size: int, seed: int
    ) -> None:
        self.config, self.seed = config, seed
        self.size = image_size
        self.count = dataset.train_labels.shape[0]
        self.batch_size = min(batch_size, self.count)
        self.steps_per_epoch = self.count // self.batch_size
        values = dataset.train_images.double() / 255
        self.mean, self.std = float(values.mean()), float(values.std())
        self._images, self._labels = dataset.train_images, dataset.train_labels
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def train(self, step: int, samples: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 1, size, size) fp32 and labels (B,) of a training step.

        Args:
            step: of the run.
            samples: (first, end) of those of the batch to return, augmented as in the whole; None for all.
        """
        first, end = (0, self.batch_size) if samples is None else samples
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        ids = self._order[place * self.batch_size : (place + 1) * self.batch_size][first:end]
        images = self._augment(self._pad(self._images[ids]), step, slice(first, end))
        return self._normalize(images), self._labels[ids]

    def evaluation(self, images: Tensor) -> Tensor:
        """uint8 (B, h, w) to model input: padded with black, mean 0 and deviation 1, nothing random."""
        return self._normalize(self._pad(images))

    def _pad(self, images: Tensor) -> Tensor:
        height, width = self.size - images.shape[1], self.size - images.shape[2]
        return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))

    def _normalize(self, images: Tensor) -> Tensor:
        return ((images.float() / 255 - self.mean) / self.std)[:, None]

    def _augment(self, images: Tensor, step: int, part: slice) -> Tensor:
        """Draw for every image of the batch, use what is for these."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", step))
        if self.config.flip:
            flipped = torch.rand(self.batch_size, generator=generator)[part] < 0.5
            images = torch.where(flipped[:, None, None], images.flip(2), images)
        if self.config.shift:
            reach, shape = self.config.shift, (self.batch_size, 1, 1)
            dy, dx = (torch.randint(2 * reach + 1, shape, generator=generator)[part] for _ in "yx")
            images = _shift(images, reach, dy, dx)
        return images


def _shift(images: Tensor, reach: int, dy: Tensor, dx: Tensor) -> Tensor:
    """Move each image by up to `reach` pixels both ways, by one gather from a padded copy.

    Args:
        images: (B, height, width).
        reach: most pixels.
        dy, dx: int64 (B, 1, 1) in 0..2 * reach; reach for no move.
    """
    height, width = images.shape[1:]
    padded = F.pad(images, (reach,) * 4)
    index = (dy + torch.arange(height)[:, None]) * padded.shape[2] + dx + torch.arange(width)
    return padded.flatten(1).gather(1, index.flatten(1)).view_as(images)
