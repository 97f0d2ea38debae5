"""The layer's way to experts on other ranks: dispatch, experts and combine under an execution plan."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexpert import ops
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.plan import AnyPlan, ExecutionPlan, check_plan
from flexpert.core.routing import AnyRouting, CapacityRouting
from flexpert.dispatch import gather

from .call import Call
from .chooser import PlanChooser
from .differentiable import all_reduce
from .layout import check_bank, check_bank_allows
from .mesh import ExpertMesh
from .routes import Arrivals
from .switch import Cut, even_counts


class ExpertParallel:
    """Runs a layer's experts on the ranks of a mesh; `parallelize` gives one to each MoE layer.

    Args:
        name: of the layer's experts, for messages.
        mesh: the ranks.
        plan: for calls that bring none; "auto" leaves it to `chooser`.
        verify: before rows travel, compare plan, layer and dtypes of all ranks, so that ranks that differ get
            an error instead of a deadlock. It costs nothing where counts travel anyway (ragged, r >= 1), and
            else a small exchange.

    Attributes:
        chooser: of the plans of "auto"; `flexpert.tune.attach` sets it. None: nobody chooses.
    """

    def __init__(self, name: str, mesh: ExpertMesh, plan: AnyPlan, verify: bool = True) -> None:
        self.name, self.mesh, self.plan, self.verify = name, mesh, plan, verify
        self.chooser: PlanChooser | None = None
        # Of the last few shapes: what small calls would else spend their time on.
        self.even_arrivals = lru_cache(maxsize=8)(self._even_arrivals)
        self._checked: set[ExecutionPlan] = set()
        self._cuts: WeakKeyDictionary[Any, Cut] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        """The same object: process groups are shared, not copied."""
        return self

    def complete(self, context: RoutingContext) -> RoutingContext:
        """The context with the sum over all ranks of the mesh, for losses of scope "global"."""
        if context.all_reduce is not None:
            return context
        return dataclasses.replace(context, all_reduce=lambda tensor: all_reduce(tensor, self.mesh.everyone))

    def at_once(self, *args: Any) -> None:
        """None: rows travel, so all parts are needed one by one."""

    def check(self, plan: ExecutionPlan, experts: Any) -> None:
        """Refuse a plan that this layer cannot run, before any work is done.

        Raises:
            ConfigError: what is missing, and the remedy.
        """
        if plan in self._checked:
            return
        self.mesh.check(plan)
        for name, bank in experts.groups().items():
            if bank.remote:
                check_bank_allows(plan, bank, f"{self.name}.{name}" if name else self.name, self.mesh)
        self._checked.add(plan)

    def cut_of(self, bank: Any) -> Cut:
        """How the tensors of a bank are cut."""
        cut = self._cuts.get(bank)
        if cut is None:
            cut = self._cuts[bank] = Cut(bank, self.mesh)
        return cut

    def _even_arrivals(self, rows: int, num_experts: int, r: int, algorithm: str, degree: int) -> Arrivals:
        """Of buffers of `rows` rows for every expert."""
        matrix = even_counts(rows, num_experts, self.mesh, r)
        return Arrivals(self.mesh.algorithms[algorithm].known(matrix), degree)

    def __call__(
        self,
        x_TD: Tensor,
        routing: AnyRouting,
        experts: Any,
        combine: Any,
        plan: AnyPlan | None = None,
    ) -> Tensor:
        """The layer's output (T, O) in x's dtype, without shared experts."""
        run = self._run_eagerly if torch.compiler.is_compiling() else self._run
        return run(x_TD, routing, experts, combine, plan)

    def _run(
        self, x_TD: Tensor, routing: AnyRouting, experts: Any, combine: Any, plan: AnyPlan | None
    ) -> Tensor:
        counts = routing.counts_E.tolist()
        capacity = routing.buffer_capacity if isinstance(routing, CapacityRouting) else None
        plan = self._chosen(self.plan if plan is None else plan, counts, capacity, x_TD.shape[0])
        self.check(plan, experts)
        rows_ND = combine.prepare(gather(x_TD, routing), routing)
        parts, first_expert, first_row = [], 0, 0
        for name, bank in experts.groups().items():
            own = counts[first_expert : first_expert + bank.num_experts]
            first_expert += bank.num_experts
            size = sum(own)
            segment = rows_ND if size == len(rows_ND) else rows_ND[first_row : first_row + size]
            first_row += size
            call = Call(self, f"{self.name}.{name}" if name else self.name, bank, plan)
            with ops.wanting(plan.kernel):
                parts.append(call(segment, own, capacity))
        if first_row < len(rows_ND):
            parts.append(parts[0].new_zeros(len(rows_ND) - first_row, experts.output_dim))
        rows_NO = parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts])
        y_TO: Tensor = combine(rows_NO, routing, x_TD.dtype)
        return y_TO

    _run_eagerly = torch.compiler.disable(_run)  # counts decide what is sent

    def _chosen(self, plan: AnyPlan, counts: list[int], capacity: int | None, tokens: int) -> ExecutionPlan:
        """The plan of a call.

        Raises:
            ConfigError: nobody is there to choose one.
        """
        if isinstance(plan, ExecutionPlan):
            return plan
        check_plan(plan)
        if self.chooser is not None:
            return self.chooser.plan_for(self.name, counts, capacity, tokens)
        if self.mesh.everyone.size == 1:
            return ExecutionPlan()
        raise ConfigError(
            f"{self.name}: plan='auto', but nobody chooses: call flexpert.tune.attach(model, tuner) on every "
            f"rank after parallelize, or give an ExecutionPlan"
        )


def prepare(name: str, experts: Any, mesh: ExpertMesh, plan: AnyPlan, verify: bool) -> ExpertParallel:
    """The transport of a layer whose bank fits the mesh and allows the default plan.

    Raises:
        ConfigError: it does not.
    """
    name = f"{name}.experts" if name else "experts"
    check_plan(plan)
    check_bank(name, experts, mesh)
    transport = ExpertParallel(name, mesh, plan, verify)
    if isinstance(plan, ExecutionPlan):
        transport.check(plan, experts)
    return transport
