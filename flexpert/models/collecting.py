"""MoE layers inside a model of `transformers`, which hand their losses to the model around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexpert.core.config import MoEConfig
from flexpert.core.context import RoutingContext
from flexpert.layer import MoE


class LossCollector:
    """What a model and its MoE layers tell each other while the model's forward runs.

    Attributes:
        calls: the losses of each call; None where nobody asks for them.
        mask: bool, True for a real token, of the shape of the tokens; None: all are.
        stand_in: the backbone computes a sample in place of none; no token of it is to be routed.
    """

    def __init__(self) -> None:
        self.calls: list[Mapping[str, Tensor]] | None = None
        self.mask: Tensor | None = None
        self.stand_in = False

    def terms(self) -> dict[str, Tensor]:
        """The losses by name, each 1-D over the calls."""
        calls = self.calls or []
        return {name: torch.stack([losses[name] for losses in calls]) for name in (calls[0] if calls else ())}

    def reset(self) -> None:
        """Back to what holds between two calls of the model."""
        self.calls, self.mask, self.stand_in = None, None, False


class CollectingMoE(MoE):
    """A MoE layer that also hands its losses to the model around it.

    In training they are part of every call, so that activation checkpointing recomputes what it has seen.
    """

    def __init__(self, config: MoEConfig, collector: LossCollector) -> None:
        super().__init__(config)
        self.collector = collector

    def forward(self, x: Tensor, *, return_info: bool = False, **call: Any) -> Any:
        """As of `MoE`; a sample that stands in for none gets zeros, and the model's mask holds."""
        if self.collector.mask is not None:
            call["context"] = self._masked(call.get("context"))
        if not self.collector.stand_in:
            return self._compute(x, return_info=return_info, **call)
        result = self._compute(x[:0], return_info=return_info, **call)
        y = result[0] if return_info else result
        y = y.new_zeros(x.shape) + y.sum()  # with the graph of the call: its backward may be a collective
        return (y, result[1]) if return_info else y

    def _masked(self, context: RoutingContext | None) -> RoutingContext:
        """The context of this call, or of the surrounding scope, with the model's mask if it has none."""
        if context is None and self.scope is not None:
            context = self.scope.context_for_call()
        context = RoutingContext() if context is None else context
        return context if context.mask is not None else dataclasses.replace(context, mask=self.collector.mask)

    def _compute(self, x: Tensor, *, return_info: bool, **call: Any) -> Any:
        calls = self.collector.calls
        if not self.training and calls is None:
            return super().forward(x, return_info=return_info, **call)
        y, info = super().forward(x, return_info=True, **call)
        if calls is not None:
            calls.append(info.losses)
        return (y, info) if return_info else y


def none_of(output: Any) -> Any:
    """An output of a model without its samples: every tensor cut to none on its first dimension."""
    if isinstance(output, dict):
        return {name: none_of(value) for name, value in output.items()}
    return tuple(map(none_of, output)) if isinstance(output, tuple) else output[:0].clone()  # FSDP: no views
