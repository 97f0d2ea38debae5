"""Balance without a loss: a bias on the selection, moved against the load (Wang et al., arXiv 2408.15664)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.config import require_number
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.stats import RoutingStats


class BiasBalancer:
    """Raises the selection bias of underloaded experts and lowers that of overloaded ones.

    Call `observe` with the statistics of each micro-batch (any number of them) and `step` once per optimiser
    step.

    Args:
        model: its routers with `selection_bias=True` are balanced; names are those of `named_modules`.
        rate: u, what a bias moves by in one step.
        rule: "sign" (u * sign(mean load - load), the published default) or "proportional"
            (u * (mean load - load) / mean load).
    """

    def __init__(self, model: nn.Module, *, rate: float = 0.001, rule: str = "sign") -> None:
        require_number("rate", rate, above=0)
        if rule not in ("sign", "proportional"):
            raise ConfigError(f"rule={rule!r}: expected 'sign' or 'proportional'")
        self.rate, self.rule = rate, rule
        self._routers = {
            _layer_of(name): module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "selection_bias", None), Tensor)
        }
        if not self._routers:
            raise ConfigError("model has no router with selection_bias=True; there is nothing to balance")
        self._load: dict[str, Tensor] = {}

    def observe(self, stats: Mapping[tuple[str, int], RoutingStats]) -> None:
        """Add the loads of one micro-batch.

        Args:
            stats: `routing_scope(...).stats`, or {("", 0): info.stats} for a lone layer.
        """
        known = False
        for (layer, _), value in stats.items():
            if layer in self._routers:
                known = True
                previous = self._load.get(layer)
                self._load[layer] = value.selected_E if previous is None else previous + value.selected_E
        if stats and not known:
            raise InputError(
                f"stats are of layers {sorted({k for k, _ in stats})}; balanced are {sorted(self._routers)}"
            )

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by the loads seen since the last step; without any, nothing happens."""
        for layer, load_E in self._load.items():
            error_E = load_E.mean() - load_E
            move_E = error_E.sign() if self.rule == "sign" else error_E / load_E.mean().clamp(min=1)
            bias: Any = self._routers[layer].selection_bias
            bias.add_(self.rate * move_E)
        self._load.clear()


def _layer_of(router: str) -> str:
    """The name of the layer that has the router of this name."""
    return "" if router == "router" else router.removesuffix(".router")
