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

    def train(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 1, size, size) fp32 and labels (B,) of a training step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        ids = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        images = self._augment(self.normalize(self._images[ids]), step)
        return images, self._labels[ids]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, h, w) to fp32 (B, 1, size, size) of mean 0 and deviation 1, padded with black."""
        x = (images[:, None].float() / 255 - self.mean) / self.std
        height, width = self.size - x.shape[2], self.size - x.shape[3]
        padding = (width // 2, width - width // 2, height // 2, height - height // 2)
        return F.pad(x, padding, value=-self.mean / self.std)

    def _augment(self, images: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", step))
        batch = images.shape[0]
        if self.config.flip:
            flipped = torch.rand(batch, generator=generator) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        if self.config.shift:
            images = _shift(images, self.config.shift, -self.mean / self.std, generator)
        return images


def _shift(images: Tensor, reach: int, fill: float, generator: torch.Generator) -> Tensor:
    """Move each image by up to `reach` pixels both ways, by one gather from a padded copy."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, value=fill)
    dy = torch.randint(2 * reach + 1, (batch, 1, 1), generator=generator)
    dx = torch.randint(2 * reach + 1, (batch, 1, 1), generator=generator)
    rows = dy + torch.arange(height)[:, None]
    columns = dx + torch.arange(width)
    index = (rows * padded.shape[3] + columns).flatten(1)
    return padded.flatten(1).gather(1, index).view_as(images)
