"""What the loop needs of a job; the loop knows nothing of images or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from flexpert.core.stats import RoutingStats, merge_stats


class Task(Protocol):
    """A model, its data and its loss.

    Attributes:
        model: what is trained.
        steps_per_epoch: batches in one pass over the data.
        tokens_per_step: tokens that enter the first layer in a step, on all ranks.
        score: the name of the figure that tells how good the model is, in `evaluate` and in a step's metrics.
        source: what is trained on, for people.
    """

    model: nn.Module
    steps_per_epoch: int
    tokens_per_step: int
    score: str

    @property
    def source(self) -> str:
        """See above."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimiser."""

    def loss(self, step: int, part: int = 0, parts: int = 1) -> StepResult:
        """Loss of this rank's samples of a micro-batch, a function of (seed, step, weights, random state).

        The sum over the micro-batches of the means over ranks is the loss of the step's batch. Every rank
        calls the model equally often, also one that has no sample.

        Args:
            step: of the run; its batch depends on (seed, step) alone, not on the number of ranks or parts.
            part: which micro-batch, 0..parts - 1.
            parts: micro-batches that the batch is cut into.
        """

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, `score` among them; the same on every rank."""

    def load(self) -> Mapping[str, list[float]]:
        """Share of the rows each expert computes on held-out data, by layer; every rank calls it."""

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the model for users, with these tensors in place of its own where given."""

    def closing(self, folder: Path) -> dict[str, Any]:
        """More for the summary of a run, from the model saved in `folder`; on rank 0."""

    def headline(self, figures: Mapping[str, Any]) -> str:
        """The figures of `evaluate` in a phrase."""


@dataclass(frozen=True)
class StepResult:
    """Loss and figures of one step, or of one of its micro-batches.

    Attributes:
        loss: scalar to differentiate.
        metrics: detached scalars to log; like the loss, sums over micro-batches and means over ranks.
        stats: routing statistics by (layer name, call); empty for a dense model.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    stats: Mapping[tuple[str, int], RoutingStats]

    @classmethod
    def merged(cls, parts: Sequence[StepResult]) -> StepResult:
        """The result of a step from those of its micro-batches, without their graphs."""
        if len(parts) == 1:
            return cls(parts[0].loss.detach(), parts[0].metrics, parts[0].stats)
        return cls(
            loss=_sum([part.loss.detach() for part in parts]),
            metrics={name: _sum([part.metrics[name] for part in parts]) for name in parts[0].metrics},
            stats={key: merge_stats([part.stats[key] for part in parts]) for key in parts[0].stats},
        )


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
