"""The way from routed tokens to experts and back, where all experts are on this rank.

Those over several ranks are in `flexpert.parallel`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from flexpert import ops
from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.plan import AnyPlan, ExecutionPlan, check_plan
from flexpert.core.routing import AnyRouting, CapacityRouting, DenseRouting

from .dispatch import gather
from .experts import ExpertBatch

if TYPE_CHECKING:
    from flexpert.parallel.chooser import PlanChooser


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

    Attributes:
        name: of the layer's experts, for the chooser.
        plan: for calls that bring none; None: the default one.
        chooser: of the plans of "auto"; `flexpert.tune.attach` sets it. None: "auto" is the default plan.
    """

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused
        self.name = "experts"
        self.plan: AnyPlan | None = None
        self.chooser: PlanChooser | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalTransport:
        """One without a chooser, which belongs to the model it was attached to."""
        return LocalTransport(fused=self.fused)

    def complete(self, context: RoutingContext) -> RoutingContext:
        """The context with what the ranks add to it: nothing."""
        return context

    def at_once(
        self, x_TD: Tensor, router: Any, experts: Any, context: RoutingContext, plan: AnyPlan | None
    ) -> Tensor | None:
        """The routed experts' output of few tokens where nobody needs their routing, in one operator.

        None where that cannot be: parts that do more than it knows, hooks, gradients, compilation.
        """
        if plan is not None or self.plan is not None or self.chooser is not None:
            return None
        if not self.fused or len(x_TD) > ops.FEW_TOKENS:
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
            ConfigError: a plan that is neither one nor "auto".
        """
        plan = self.plan if plan is None else check_plan(plan)
        if isinstance(plan, ExecutionPlan) and plan.r > 1:
            raise InputError(
                f"plan: r={plan.r} needs several ranks per expert; lay the model out with "
                f"flexpert.parallel.parallelize, or use r=0 or r=1"
            )
        if plan is None or torch.compiler.is_compiling():  # a compiled graph has the default plan
            return self._run(x_TD, routing, experts, combine, padded=False)
        if not isinstance(plan, ExecutionPlan):
            plan = self._chosen(routing, x_TD.shape[0])
        with ops.wanting(plan.kernel):
            return self._run(x_TD, routing, experts, combine, padded=plan.capacity == "padded")

    def _chosen(self, routing: AnyRouting, tokens: int) -> ExecutionPlan:
        """The plan of a call that leaves it open."""
        if self.chooser is None:
            return ExecutionPlan()
        capacity = routing.buffer_capacity if isinstance(routing, CapacityRouting) else None
        return self.chooser.plan_for(self.name, routing.counts_E.tolist(), capacity, tokens)

    def _run(self, x_TD: Tensor, routing: AnyRouting, experts: Any, combine: Any, *, padded: bool) -> Tensor:
        if self.fused and padded and not isinstance(routing, DenseRouting):
            return experts.padded(x_TD, routing)
        if self.fused:
            return experts.fused(x_TD, routing)
        rows_ND = combine.prepare(gather(x_TD, routing), routing)
        units_N = getattr(routing, "unit_N", None)
        batch = ExpertBatch(rows_ND=rows_ND, counts_E=routing.counts_E, unit_N=units_N)
        return combine(experts(batch), routing, x_TD.dtype)
