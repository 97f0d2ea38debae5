"""A balance loss inside the loss that a model returns, for training loops that are not one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.config import require_number
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.registry import LOSSES
from flexpert.core.stats import RoutingStats, merge_stats

from .probe import RouterProbe

_OWN_LOSS = "output_router_logits"


class AttachedBalance:
    """Adds weight * (mean over layers of a routing loss) to every loss that the model returns.

    Made by `attach_balance`. Statistics are added up over calls until they are taken, so that one step of
    several micro-batches gives one set.

    Attributes:
        probe: what watches the routers.
        last: the unweighted mean of the last call that had a loss, detached; None before.
    """

    def __init__(self, model: nn.Module, probe: RouterProbe, weight: float, name: str, scope: str) -> None:
        self.probe = probe
        self.last: Tensor | None = None
        self._weight, self._name, self._scope = weight, name, scope
        self._seen: dict[str, RoutingStats] = {}
        probe.attach()
        self._hook = model.register_forward_hook(self._add, with_kwargs=True)

    def take_stats(self) -> dict[str, RoutingStats]:
        """Statistics of each layer since they were last taken, over all calls that had a loss."""
        seen, self._seen = self._seen, {}
        return seen

    def detach(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        self.probe.detach()

    def _add(self, _: nn.Module, __: Sequence[Any], given: Mapping[str, Any], output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if not isinstance(loss, Tensor):
            self.probe.clear()
            return output
        term = self.probe.loss(self._name, scope=self._scope).mean()
        self.last = term.detach()
        output["loss"] = loss + (self._weight * _share(given) * term).to(loss.dtype)
        for layer, stats in self.probe.stats_of_layers().items():
            before = self._seen.get(layer)
            self._seen[layer] = stats if before is None else merge_stats([before, stats])
        self.probe.clear()
        return output


def _share(given: Mapping[str, Any]) -> Tensor | float:
    """This call's part of the batch, where the model divides its loss by the items of several calls."""
    items, labels = given.get("num_items_in_batch"), given.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    return (labels != -100).sum() / torch.as_tensor(items, device=labels.device).clamp(min=1)


def attach_balance(
    model: nn.Module,
    *,
    weight: float = 0.01,
    name: str = "balance",
    scope: str = "micro_batch",
    context: RoutingContext | None = None,
    score: str | None = None,
) -> AttachedBalance:
    """Add a balance loss to the loss of a model of transformers, whoever trains it.

    The term is computed layer by layer, is 1.0 at perfect balance for every number of experts per token, and
    is averaged over layers. Where the trainer accumulates gradients by `num_items_in_batch`, each call adds
    its share, so that the term's weight does not grow with the number of micro-batches.

    Args:
        model: returns an output with `loss` when it is given labels.
        weight: of the term.
        name: of the loss in `flexpert.losses`.
        scope: of the loss: "micro_batch", "sequence" or "global".
        context, score: as of `RouterProbe`.

    Raises:
        ConfigError: the model has no routed experts, or adds its own balance loss.
    """
    require_number("weight", weight, least=0)
    LOSSES.get(name)  # an unknown name is refused here
    if getattr(getattr(model, "config", None), _OWN_LOSS, False):
        raise ConfigError(
            f"model.config.{_OWN_LOSS} is True, so {type(model).__name__} adds its own balance loss, "
            f"which mixes layers; set it to False"
        )
    return AttachedBalance(model, RouterProbe(model, context=context, score=score), weight, name, scope)
