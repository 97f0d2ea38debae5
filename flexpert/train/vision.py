"""The image-classification job: SwinV2-MoE on images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.stats import reduce_stats
from flexpert.models.swinv2_moe import (
    SwinV2MoEConfig,
    SwinV2MoEForImageClassification,
    parameter_groups,
    preset,
)
from flexpert.scope import routing_scope

from .config import TrainConfig
from .data import ImageDataset, load_fashion_mnist
from .figures import drop_rate, quieten_transformers, shares
from .images import ImageBatches
from .parallel import OneRank, weighted
from .task import StepResult
from .world import World, cut

DATASETS = {"fashion_mnist": load_fashion_mnist}


def load_dataset(config: TrainConfig) -> ImageDataset:
    """The images a configuration names.

    Raises:
        ConfigError: an unknown data set.
    """
    if config.data.name not in DATASETS:
        raise ConfigError(f"data.name={config.data.name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[config.data.name](config.data.folder)


class VisionTask:
    """Trains and evaluates a SwinV2-MoE classifier; see `Task`.

    Args:
        config: settings of the run.
        model: in place of a new one made from the settings.
        ranks: that share each batch and the test images; this process alone if not given.
    """

    score = "accuracy"

    def __init__(
        self,
        config: TrainConfig,
        model: SwinV2MoEForImageClassification | None = None,
        ranks: OneRank | None = None,
    ) -> None:
        self.config = config
        self.ranks = OneRank(device=World().device(config.device)) if ranks is None else ranks
        quieten_transformers()
        self.device = self.ranks.device
        self.dataset = load_dataset(config)
        self.model = build_model(config) if model is None else model
        self.model.to(self.device)
        vision = self.model.config
        self.batches = ImageBatches(
            self.dataset,
            config.data,
            image_size=vision.image_size,
            batch_size=config.optimizer.batch_size,
            seed=config.seed,
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.tokens_per_step = self.batches.batch_size * (vision.image_size // vision.patch_size) ** 2

    @classmethod
    def from_saved(cls, config: TrainConfig, folder: Path, ranks: OneRank | None = None) -> VisionTask:
        """The task with the model that `save` wrote.

        Raises:
            CheckpointError: a damaged or foreign file.
        """
        quieten_transformers()
        return cls(config, SwinV2MoEForImageClassification.from_pretrained(folder), ranks)

    @property
    def source(self) -> str:
        """What is trained on, for people."""
        return f"images from {self.dataset.source}"

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW."""
        return parameter_groups(self.model, weight_decay)

    def loss(self, step: int, part: int = 0, parts: int = 1) -> StepResult:
        """Cross entropy plus the weighted balance loss of this rank's images of a micro-batch; see `Task`."""
        total, world = self.batches.batch_size, self.ranks.world
        begin, stop = cut(0, total, part, parts)
        samples = cut(begin, stop, world.rank, world.size)
        images, labels = (values.to(self.device) for values in self.batches.train(step, samples))
        context = RoutingContext(step=step, samples=samples, all_reduce=self.ranks.all_reduce)
        with routing_scope(self.model, context=context) as scope:
            logits = self._logits(images)
        own = len(labels) * world.size / total  # a mean over own images becomes one over the batch
        smoothing = self.config.optimizer.label_smoothing
        right = (logits.detach().argmax(-1) == labels).float()
        loss = (
            weighted(F.cross_entropy(logits, labels, label_smoothing=smoothing), own) if own else logits.sum()
        )
        metrics = {"accuracy": weighted(right.mean(), own) if own else right.sum()}
        if scope.infos:
            share = (stop - begin) / total
            loss = loss + weighted(self.model.weighted_balance_loss(scope.losses), share)
            name = self.model.config.balance_loss
            metrics[name] = weighted(scope.losses[name].detach().mean(), share)
        return StepResult(loss, metrics, scope.stats)

    @torch.no_grad()
    def evaluate(self, context: RoutingContext | None = None, batch_size: int = 500) -> dict[str, float]:
        """Accuracy on the test images, and the share of assignments dropped where there are MoE layers.

        Ranks take whole batches in turn, so capacity applies to the same images on any number of them; each
        calls the model equally often, in the end perhaps with no image.
        """
        self.model.eval()
        images, labels = self.dataset.test_images, self.dataset.test_labels
        correct, dropped, selected = 0, 0.0, 0.0
        for turn in range(0, len(labels), batch_size * self.ranks.world.size):
            first = turn + batch_size * self.ranks.world.rank
            chunk, target = images[first : first + batch_size], labels[first : first + batch_size]
            with routing_scope(self.model, context=context) as scope:
                logits = self._logits(self.batches.evaluation(chunk).to(self.device))
            correct += int((logits.argmax(-1).cpu() == target).sum())
            dropped += sum(float(s.dropped) for s in scope.stats.values())
            selected += sum(float(s.selected_E.sum()) for s in scope.stats.values())
        counts = torch.tensor([correct, dropped, selected], dtype=torch.float64, device=self.device)
        correct, dropped, selected = self.ranks.total(counts).tolist()
        result = {"accuracy": correct / len(labels), "images": len(labels)}
        return result | drop_rate(dropped, selected)

    def load(self, images: int = 2000) -> Mapping[str, list[float]]:
        """Share of the rows each expert computes on test images, by layer; empty for a dense model."""
        self.model.eval()
        world = self.ranks.world
        first, end = cut(0, min(images, len(self.dataset.test_images)), world.rank, world.size)
        chunk = self.batches.evaluation(self.dataset.test_images[first:end]).to(self.device)
        with torch.no_grad(), routing_scope(self.model) as scope:
            self._logits(chunk)
        stats = reduce_stats(scope.stats, self.ranks.total)
        return {name: shares(value) for (name, _), value in stats.items()}

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the model: safetensors, config, card; as one process would, also where ranks share it."""
        model, config = self.model, cast("SwinV2MoEConfig", self.model.config)
        if type(model) is not SwinV2MoEForImageClassification:  # data parallelism has put another class on it
            with torch.device("meta"):
                model = SwinV2MoEForImageClassification(config)
        model.save_pretrained(folder, state_dict=tensors)

    def closing(self, folder: Path) -> dict[str, Any]:
        """Nothing more."""
        return {}

    @staticmethod
    def headline(figures: Mapping[str, Any]) -> str:
        """The figures of `evaluate` in a phrase."""
        return f"accuracy {figures['accuracy']:.4f} on {figures['images']} test images"

    def _logits(self, images: Tensor) -> Tensor:
        bfloat16 = self.config.optimizer.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return self.model(pixel_values=images).logits.float()


def build_model(config: TrainConfig) -> SwinV2MoEForImageClassification:
    """A new model from the settings: a preset and changes to it.

    Raises:
        ConfigError: no preset, or settings the model does not have.
    """
    settings = dict(config.model)
    if "preset" not in settings:
        raise ConfigError("model.preset is missing; expected one of tiny, small, base")
    return SwinV2MoEForImageClassification(preset(settings.pop("preset"), **settings))
