"""The image-classification job: SwinV2-MoE on images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flexpert.models.swinv2_moe import SwinV2MoEForImageClassification, preset

from .config import TrainConfig
from .data import load_fashion_mnist
from .images import ImageBatches
from .model_task import ModelTask
from .one_rank import OneRank


class VisionTask(ModelTask):
    """Trains and evaluates a SwinV2-MoE classifier; see `ModelTask`."""

    model_class = SwinV2MoEForImageClassification
    datasets = {"fashion_mnist": load_fashion_mnist}  # noqa: RUF012 - declared in the base
    score = "accuracy"
    evaluation_batch = 500
    load_items = 2000

    def __init__(self, config: TrainConfig, model: Any = None, ranks: OneRank | None = None) -> None:
        super().__init__(config, model, ranks)
        vision = self.model.config
        self.batches = ImageBatches(
            self.dataset,
            config.data,
            image_size=vision.image_size,
            batch_size=config.optimizer.batch_size,
            seed=config.seed,
        )
        self.tokens_per_step = self.batches.batch_size * (vision.image_size // vision.patch_size) ** 2

    @property
    def source(self) -> str:
        """What is trained on, for people."""
        return f"images from {self.dataset.source}"

    def new_model(self, preset_name: str, changes: dict[str, Any]) -> SwinV2MoEForImageClassification:
        """A new model of a preset with changes to it.

        Raises:
            ConfigError: an unknown preset, or settings the model does not have.
        """
        return SwinV2MoEForImageClassification(preset(preset_name, **changes))

    def batch_loss(self, step: int, samples: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy and accuracy of these images of a step's batch; of none: zeros with a graph."""
        images, labels = (values.to(self.device) for values in self.batches.train(step, samples))
        logits = self._logits(images)
        right = (logits.detach().argmax(-1) == labels).float()
        if not len(labels):
            return logits.sum(), {self.score: right.sum()}
        smoothing = self.config.optimizer.label_smoothing
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), {self.score: right.mean()}

    def held_out(self) -> int:
        """Number of test images."""
        return len(self.dataset.test_labels)

    def held_out_sums(self, first: int, end: int) -> list[float]:
        """Of these test images: how many are recognised."""
        images, labels = self.dataset.test_images[first:end], self.dataset.test_labels[first:end]
        logits = self._logits(self.batches.evaluation(images).to(self.device))
        return [float((logits.argmax(-1).cpu() == labels).sum())]

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Accuracy on the test images, and their number."""
        return {"accuracy": sums[0] / self.held_out(), "images": self.held_out()}

    def headline(self, figures: Mapping[str, Any]) -> str:
        """The figures of `evaluate` in a phrase."""
        return f"accuracy {figures['accuracy']:.4f} on {figures['images']} test images"

    def _logits(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.model(pixel_values=images).logits.float()
