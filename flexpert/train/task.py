"""What the loop needs of a job; the loop knows nothing of images or text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from flexpert.core.stats import RoutingStats


class Task(Protocol):
    """A model, its data and its loss.

    Attributes:
        model: what is trained.
        steps_per_epoch: batches in one pass over the data.
        tokens_per_step: tokens that enter the first layer in a step.
    """

    model: nn.Module
    steps_per_epoch: int
    tokens_per_step: int

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimiser."""

    def loss(self, step: int) -> StepResult:
        """Loss of the batch of this step, a function of (seed, step, weights, random state) alone."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, "accuracy" among them."""

    def save(self, folder: Path) -> None:
        """Write the model for users."""


class StepResult:
    """Loss and figures of one step.

    Args:
        loss: scalar to differentiate.
        metrics: detached scalars to log.
        stats: routing statistics by (layer name, call); empty for a dense model.
    """

    def __init__(
        self, loss: Tensor, metrics: Mapping[str, Tensor], stats: Mapping[tuple[str, int], RoutingStats]
    ) -> None:
        self.loss, self.metrics, self.stats = loss, metrics, stats
