"""The way from routed tokens to experts and back, where all experts are on this rank.

Those over several ranks are in `flexpert.parallel`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from flexpert import ops
from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.plan import AnyPlan, ExecutionPlan, check_plan
from flexpert.core.routing import AnyRouting

from .dispatch import gather
from .experts import ExpertBatch


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches calls of a module, or has put another `forward` in the place of its own."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)


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

    def at_once(
        self, x_TD: Tensor, router: Any, experts: Any, context: RoutingContext, plan: AnyPlan | None
    ) -> Tensor | None:
        """The routed experts' output of few tokens where nobody needs their routing, in one operator.

        None where that cannot be: parts that do more than it knows, hooks, gradients, compilation.
        """
        if plan is not None or not self.fused or len(x_TD) > ops.FEW_TOKENS:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        choice = getattr(router, "choice", None)
        choice = None if choice is None or has_hooks(router) else choice(x_TD, context)
        return None if choice is None else experts.routed(x_TD, choice)

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
