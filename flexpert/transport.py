"""The way from routed tokens to experts and back, where all experts are on this rank.

Those over several ranks are in `flexpert.parallel`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.plan import AnyPlan, ExecutionPlan, check_plan
from flexpert.core.routing import AnyRouting

from .dispatch import gather
from .experts import ExpertBatch


class LocalTransport:
    """Dispatch, experts and combine on one rank.

    Args:
        fused: the bank's one operator computes all three.
    """

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused

    def complete(self, context: RoutingContext) -> RoutingContext:
        """The context with what the ranks add to it: nothing."""
        return context

    def __call__(
        self,
        x_TD: Tensor,
        routing: AnyRouting,
        experts: Any,
        combine: Any,
        plan: AnyPlan | None = None,
    ) -> Tensor:
        """The routed experts' output (T, O) in x's dtype.

        Raises:
            InputError: a plan for slices of experts, which one rank does not have.
            ConfigError: a plan that is neither one nor "auto" (which is, here, the only one there is).
        """
        if plan is not None:
            check_plan(plan)
        if isinstance(plan, ExecutionPlan) and plan.r > 1:
            raise InputError(
                f"plan: r={plan.r} needs several ranks per expert; lay the model out with "
                f"flexpert.parallel.parallelize, or use r=0 or r=1"
            )
        if self.fused:
            return experts.fused(x_TD, routing)
        rows_ND = combine.prepare(gather(x_TD, routing), routing)
        units_N = getattr(routing, "unit_N", None)
        batch = ExpertBatch(rows_ND=rows_ND, counts_E=routing.counts_E, unit_N=units_N)
        return combine(experts(batch), routing, x_TD.dtype)
