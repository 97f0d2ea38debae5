"""What a training loop owes its routers, whoever runs the loop: a balance loss, a bias step, statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from flexpert.balancers import BiasBalancer
from flexpert.core.config import require_number
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.registry import LOSSES, Spec, split_spec
from flexpert.core.stats import RoutingStats, merge_stats, reduce_stats
from flexpert.parallel.differentiable import all_reduce
from flexpert.parallel.group import Group

from .sources import Routers

DEFAULT_WEIGHT = 0.01


@dataclass(frozen=True, kw_only=True)
class UpkeepSettings:
    """What is to be done for a model's routers; checked when it is made.

    Attributes:
        balance_weight: of the mean of the loss over the layers. None: 0.01, or 0 for a model whose routers
            are all balanced by their bias or that adds its own loss of Flexpert already.
        loss: name of a loss, or a dict of it and its options; see `flexpert.losses`.
        bias_rate: what a selection bias moves by in one step; 0 leaves biases alone.
    """

    balance_weight: float | None = None
    loss: Spec = "balance"
    bias_rate: float = 0.001

    def __post_init__(self) -> None:
        if self.balance_weight is not None:
            require_number("balance_weight", self.balance_weight, least=0)
        require_number("bias_rate", self.bias_rate, least=0)
        LOSSES.get(split_spec(self.loss, "loss")[0])


class UpkeepCallback:
    """What the callbacks of all trainers begin with.

    Args:
        settings: the fields of `UpkeepSettings`: balance_weight, loss, bias_rate.

    Attributes:
        stats: by layer, of what was logged last.

    Raises:
        ConfigError: a value out of range, or an unknown loss.
    """

    def __init__(
        self, *, balance_weight: float | None = None, loss: Spec = "balance", bias_rate: float = 0.001
    ) -> None:
        super().__init__()
        self.settings = UpkeepSettings(balance_weight=balance_weight, loss=loss, bias_rate=bias_rate)
        self.stats: dict[str, RoutingStats] = {}
        self._upkeep: RoutingUpkeep | None = None


class RoutingUpkeep:
    """Balance loss, bias step and statistics of a model's routers.

    For each micro-batch: call the model inside `watching()`, add `term()` to the loss, `observe()`, and after
    backward `close()`. Once per optimiser step: `step()`. Whenever figures are wanted: `figures()`.

    Args:
        model: with Flexpert's layers, or models of transformers, at any depth.
        settings: what to do.

    Raises:
        ConfigError: there are no routed experts, they do not compute the loss, or the model adds another
            balance loss to its own loss.
    """

    def __init__(self, model: nn.Module, settings: UpkeepSettings) -> None:
        self._group = _world()
        context = RoutingContext(all_reduce=None if self._group is None else self._sum_with_gradient)
        self._routers = Routers(model, context)
        self._balancer = None
        if self._routers.biases and settings.bias_rate:
            self._balancer = BiasBalancer.of_biases(self._routers.biases, rate=settings.bias_rate)
        self.weight = self._weight(model, settings)
        self._loss = settings.loss
        if self.weight:
            self._routers.check_loss(self._loss)
        self._terms: list[Tensor] = []
        self._stats: dict[str, RoutingStats] = {}

    def _weight(self, model: nn.Module, settings: UpkeepSettings) -> float:
        given = settings.balance_weight
        own = own_loss(model, given != 0)
        if own and given:
            raise ConfigError(
                f"balance_weight={given}: {own} adds its own balance loss already; set "
                f"config.balance_weight to 0, or leave balance_weight out"
            )
        if given is not None:
            return float(given)
        by_bias = bool(settings.bias_rate) and self._routers.biases.keys() >= set(self._routers.layers)
        return 0.0 if own or by_bias else DEFAULT_WEIGHT

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the model's call of one micro-batch."""
        with self._routers.watching():
            yield

    def term(self) -> Tensor:
        """What to add to the mean loss of the micro-batch: the weighted balance loss, a scalar.

        Raises:
            InputError: no router was called.
        """
        terms = self._routers.loss(self._loss)
        self._terms.append(terms.detach())
        return self.weight * terms.mean()

    def observe(self) -> None:
        """Count what the routers did in the micro-batch."""
        stats = self._routers.stats
        if self._balancer is not None:
            self._balancer.observe(stats)
        for (layer, _), value in stats.items():
            before = self._stats.get(layer)
            self._stats[layer] = value if before is None else merge_stats([before, value])

    def close(self) -> None:
        """After the micro-batch's backward: leave the model alone until the next one."""
        self._routers.close()

    def step(self) -> None:
        """After the optimiser's step: move the biases by the loads of its micro-batches, on all ranks."""
        if self._balancer is not None:
            self._balancer.step(None if self._group is None else self._sum)

    def figures(self) -> tuple[dict[str, Tensor], dict[str, RoutingStats]]:
        """What was observed since the last time, on all ranks: scalars by name, and statistics by layer.

        The names are `routing/balance_loss` (unweighted; of this rank, unless its scope is "global"),
        `routing/max_violation` (of the worst layer), `routing/entropy`, `routing/drop_rate`, and the last
        three for each layer, `routing/<layer>/...`. Nothing where nothing was observed.
        """
        stats = self._stats if self._group is None else reduce_stats(self._stats, self._sum)
        figures = routing_figures(stats, self._terms)
        self._terms, self._stats = [], {}
        return figures, stats

    def _sum(self, values: Tensor) -> Tensor:
        assert self._group is not None
        total = values.clone()
        self._group.all_reduce(total)
        return total

    def _sum_with_gradient(self, values: Tensor) -> Tensor:
        assert self._group is not None
        return all_reduce(values, self._group)


def routing_figures(stats: dict[str, RoutingStats], terms: list[Tensor]) -> dict[str, Tensor]:
    """Scalars to log, of the statistics of layers and the values of a loss, 1-D each."""
    figures: dict[str, Tensor] = {}
    if not stats:
        return figures
    if terms:
        figures["routing/balance_loss"] = torch.cat(terms).mean()
    parts = {
        "max_violation": {layer: value.max_violation for layer, value in stats.items()},
        "entropy": {layer: value.entropy for layer, value in stats.items()},
        "drop_rate": {layer: value.drop_rate for layer, value in stats.items()},
    }
    for name, values in parts.items():
        stacked = torch.stack(list(values.values()))
        figures[f"routing/{name}"] = stacked.max() if name == "max_violation" else stacked.mean()
    for name, values in parts.items():
        figures |= {f"routing/{layer}/{name}": value for layer, value in values.items()}
    return figures


def own_loss(model: nn.Module, wanted: bool) -> str | None:
    """The class of a model of Flexpert inside `model` that adds its balance loss to its loss; None: none.

    Raises:
        ConfigError: a model of transformers adds its loss, which is over all layers at once, and another is
            wanted.
    """
    own = None
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(module, "weighted_balance_loss") and getattr(config, "balance_weight", None):
            own = type(module).__name__
        for part in (config, getattr(config, "text_config", None)):
            weight = getattr(part, "router_aux_loss_coef", None)
            if wanted and weight and getattr(part, "output_router_logits", False):
                raise ConfigError(
                    f"{type(module).__name__} adds the balance loss of transformers to its own loss "
                    f"(config.output_router_logits=True), which calls layers balanced that are not: set it "
                    f"to False, or give balance_weight=0 to keep that loss"
                )
    return own


def _world() -> Group | None:
    """All ranks; None for one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    ranks = range(dist.get_world_size())
    return Group("data parallel", ranks, dist.group.WORLD, [0] * len(ranks))
