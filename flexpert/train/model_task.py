"""What tasks with a model of `flexpert.models` have in common: ranks, balance loss, evaluation, saving."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.stats import reduce_stats
from flexpert.models.weight_decay import parameter_groups
from flexpert.scope import routing_scope

from .config import TrainConfig
from .parallel import OneRank, weighted
from .task import StepResult
from .world import World, cut


class ModelTask(ABC):
    """A model of transformers with MoE layers, its data and its loss; see `Task`.

    Args:
        config: settings of the run.
        model: in place of a new one made from the settings.
        ranks: that share each batch and the held-out data; this process alone if not given.

    Attributes:
        model_class: of the model, with its own `save_pretrained`.
        datasets: how to load the data that a configuration may name.
        evaluation_batch: held-out items that a model computes at a time.
        load_items: held-out items that `load` counts.
        batches: of training items: `batch_size` and `steps_per_epoch`.
    """

    model_class: type[Any]
    datasets: Mapping[str, Callable[[str | None], Any]]
    score: str
    evaluation_batch: int
    load_items: int
    batches: Any
    tokens_per_step: int

    def __init__(self, config: TrainConfig, model: Any = None, ranks: OneRank | None = None) -> None:
        self.config = config
        self.ranks = OneRank(device=World().device(config.device)) if ranks is None else ranks
        self.device = self.ranks.device
        quieten_transformers()
        if config.data.name not in self.datasets:
            raise ConfigError(f"data.name={config.data.name!r}: expected one of {', '.join(self.datasets)}")
        self.dataset = self.datasets[config.data.name](config.data.folder)
        if model is None:
            settings = dict(config.model)
            if "preset" not in settings:
                raise ConfigError("model.preset is missing; name one of the task's model, such as tiny")
            model = self.new_model(settings.pop("preset"), settings)
        self.model: Any = model.to(self.device)

    @classmethod
    def from_saved(cls, config: TrainConfig, folder: Path, ranks: OneRank | None = None) -> Any:
        """The task with the model that `save` wrote.

        Raises:
            CheckpointError: a damaged or foreign file.
        """
        quieten_transformers()
        return cls(config, cls.model_class.from_pretrained(folder), ranks)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the data."""
        return int(self.batches.steps_per_epoch)

    @property
    @abstractmethod
    def source(self) -> str:
        """What is trained on, for people."""

    @abstractmethod
    def new_model(self, preset: str, changes: dict[str, Any]) -> Any:
        """A new model of a preset with changes to it."""

    @abstractmethod
    def batch_loss(self, step: int, samples: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of these items of a step's batch, means over them; of none: zeros with a graph."""

    @abstractmethod
    def held_out(self) -> int:
        """Number of held-out items."""

    @abstractmethod
    def held_out_sums(self, first: int, end: int) -> list[float]:
        """What `figures` needs of these held-out items, perhaps of none, as sums over them."""

    @abstractmethod
    def figures(self, sums: list[float]) -> dict[str, float]:
        """The figures of all held-out items; `score` among them."""

    @abstractmethod
    def headline(self, figures: Mapping[str, Any]) -> str:
        """The figures of `evaluate` in a phrase."""

    def closing(self, folder: Path) -> dict[str, Any]:
        """More for the summary of a run, from the model saved in `folder`; on rank 0."""
        return {}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW."""
        return parameter_groups(self.model, weight_decay)

    def loss(self, step: int, part: int = 0, parts: int = 1) -> StepResult:
        """The loss plus the weighted balance loss, of this rank's items of a micro-batch; see `Task`."""
        total, world = self.batches.batch_size, self.ranks.world
        begin, stop = cut(0, total, part, parts)
        samples = cut(begin, stop, world.rank, world.size)
        context = RoutingContext(step=step, samples=samples, all_reduce=self.ranks.all_reduce)
        with routing_scope(self.model, context=context) as scope:
            loss, metrics = self.batch_loss(step, samples)
        own = (
            (samples[1] - samples[0]) * world.size / total
        )  # a mean over own items becomes one over the batch
        if own:
            loss = weighted(loss, own)
            metrics = {name: weighted(value, own) for name, value in metrics.items()}
        if scope.infos:
            share = (stop - begin) / total
            loss = loss + weighted(self.model.weighted_balance_loss(scope.losses), share)
            name = self.model.config.balance_loss
            metrics[name] = weighted(scope.losses[name].detach().mean(), share)
        return StepResult(loss, metrics, scope.stats)

    @torch.no_grad()
    def evaluate(self, context: RoutingContext | None = None) -> dict[str, float]:
        """Figures on held-out data, and the share of assignments dropped where there are MoE layers.

        Ranks take whole batches in turn, so capacity applies to the same items on any number of them; each
        calls the model equally often, in the end perhaps with no item.
        """
        self.model.eval()
        count, batch, world = self.held_out(), self.evaluation_batch, self.ranks.world
        totals: Tensor | int = 0
        for turn in range(0, count, batch * world.size):
            first = min(turn + batch * world.rank, count)
            with routing_scope(self.model, context=context) as scope:
                sums = self.held_out_sums(first, min(first + batch, count))
            dropped = sum(float(s.dropped) for s in scope.stats.values())
            selected = sum(float(s.selected_E.sum()) for s in scope.stats.values())
            totals = totals + torch.tensor(
                [*sums, dropped, selected], dtype=torch.float64, device=self.device
            )
        assert isinstance(totals, Tensor)
        *sums, dropped, selected = self.ranks.total(totals).tolist()
        return self.figures(sums) | ({"drop_rate": dropped / selected} if selected else {})

    @torch.no_grad()
    def load(self) -> Mapping[str, list[float]]:
        """Share of the rows each expert computes on held-out items, by layer; empty for a dense model."""
        self.model.eval()
        world = self.ranks.world
        first, end = cut(0, min(self.load_items, self.held_out()), world.rank, world.size)
        with routing_scope(self.model) as scope:
            self.held_out_sums(first, end)
        stats = reduce_stats(scope.stats, self.ranks.total)
        rows = {name: value.load_E for (name, _), value in stats.items()}
        return {name: (load_E / load_E.sum().clamp(min=1)).tolist() for name, load_E in rows.items()}

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the model: safetensors, config, card; as one process would, also where ranks share it."""
        model = self.model
        if type(model) is not self.model_class:  # data parallelism has put another class on it
            with torch.device("meta"):
                model = self.model_class(model.config)
        model.save_pretrained(folder, state_dict=tensors)

    def autocast(self) -> torch.autocast:
        """In which dtype the model computes: the configuration's."""
        bfloat16 = self.config.optimizer.dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16)


def quieten_transformers() -> None:
    """Its progress bars are for terminals."""
    if not sys.stderr.isatty():
        disable_progress_bar()
