"""Balance without a loss: a bias on the selection, moved against the load (Wang et al., arXiv 2408.15664)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.config import require_number
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.stats import RoutingStats


class BiasBalancer:
    """Raises the selection bias of underloaded experts and lowers that of overloaded ones.

    Call `observe` with the statistics of each micro-batch (any number of them) and `step` once per optimiser
    step; on several ranks each observes its own part and gives `step` their `all_reduce`. Loads are counted
    exactly, so the biases are the same on every rank and however the batch was cut.

    Args:
        model: its routers with `selection_bias=True` are balanced; names are those of `named_modules`.
        rate: u, what a bias moves by in one step.
        rule: "sign" (u * sign(mean load - load), the published default) or "proportional"
            (u * (mean load - load) / mean load).
    """

    def __init__(self, model: nn.Module, *, rate: float = 0.001, rule: str = "sign") -> None:
        routers = {
            _layer_of(name): module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "selection_bias", None), Tensor)
        }
        if not routers:
            raise ConfigError("model has no router with selection_bias=True; there is nothing to balance")
        self._start({layer: partial(_bias_of, router) for layer, router in routers.items()}, rate, rule)

    @classmethod
    def of_biases(
        cls, biases: Mapping[str, Callable[[], Tensor]], *, rate: float = 0.001, rule: str = "sign"
    ) -> BiasBalancer:
        """A balancer of other routers' biases.

        Args:
            biases: by the layer's name in the statistics, what returns its bias (E,), to be changed in place.
            rate, rule: as of the class.
        """
        balancer = cls.__new__(cls)
        balancer._start(biases, rate, rule)
        return balancer

    def _start(self, biases: Mapping[str, Callable[[], Tensor]], rate: float, rule: str) -> None:
        require_number("rate", rate, above=0)
        if rule not in ("sign", "proportional"):
            raise ConfigError(f"rule={rule!r}: expected 'sign' or 'proportional'")
        self.rate, self.rule = rate, rule
        self._biases = dict(biases)
        self._load: dict[str, Tensor] = {}
        self._exact: dict[str, Tensor] = {}

    def observe(self, stats: Mapping[tuple[str, int], RoutingStats]) -> None:
        """Add the loads of one micro-batch.

        Args:
            stats: `routing_scope(...).stats`, or {("", 0): info.stats} for a lone layer.
        """
        known = False
        for (layer, _), value in stats.items():
            if layer in self._biases:
                known = True
                previous = self._load.get(layer)
                load_E = value.selected_E.double()  # whole numbers, exact up to 2^53
                self._load[layer] = load_E if previous is None else previous + load_E
        if stats and not known:
            raise InputError(
                f"stats are of layers {sorted({k for k, _ in stats})}; balanced are {sorted(self._biases)}"
            )

    @torch.no_grad()
    def step(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Move the biases by the loads seen since the last step; without any, nothing happens.

        Args:
            all_reduce: the sum of an fp64 tensor over the ranks that share the batch. It is called once, so
                every rank must come here, also one that has seen nothing.
        """
        loads = self._load if all_reduce is None else self._reduced(all_reduce)
        for layer, load_E in loads.items():
            error_E = load_E.mean() - load_E
            move_E = error_E.sign() if self.rule == "sign" else error_E / load_E.mean().clamp(min=1)
            self._move(layer, self.rate * move_E)
        self._load.clear()

    def _move(self, layer: str, move_E: Tensor) -> None:
        """Add to a bias; a narrow one, in which a step would be lost, is the rounding of an exact one."""
        bias = self._biases[layer]()
        if bias.dtype.itemsize >= 4:
            bias.add_(move_E.to(bias.dtype))
            return
        exact = self._exact.get(layer)
        if exact is None or not torch.equal(
            exact.to(bias), bias
        ):  # the first step, or other weights were loaded
            exact = bias.double()
        self._exact[layer] = exact + move_E
        bias.copy_(self._exact[layer])

    def _reduced(self, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The loads of every balanced layer over all ranks; 0 for what this one has not seen."""
        biases = {name: read() for name, read in self._biases.items()}
        own = [
            self._load.get(name, torch.zeros_like(bias, dtype=torch.float64)) for name, bias in biases.items()
        ]
        totals = all_reduce(torch.cat(own)).split([load_E.numel() for load_E in own])
        return dict(zip(biases, totals, strict=True))


def _bias_of(router: Any) -> Tensor:
    bias: Tensor = router.selection_bias
    return bias


def _layer_of(router: str) -> str:
    """The name of the layer that has the router of this name."""
    return "" if router == "router" else router.removesuffix(".router")
