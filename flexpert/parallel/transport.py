"""The layer's way to experts on other ranks: dispatch, experts and combine under an execution plan."""

from __future__ import annotations

import dataclasses
import zlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, DistributedError
from flexpert.core.plan import AnyPlan, ExecutionPlan, check_plan
from flexpert.core.routing import AnyRouting, CapacityRouting
from flexpert.dispatch import gather

from .chooser import PlanChooser
from .differentiable import all_reduce
from .layout import check_bank, check_bank_allows
from .mesh import ExpertMesh
from .pending import named
from .pipeline import Exchange, run
from .routes import Routes
from .switch import counts_by_rank, even_counts, starts_by_rank, weights_for
from .timers import phase

HEADER = 10  # numbers that a rank tells the others before rows travel: its capacity, facts and plan


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
        self.even_routes = lru_cache(maxsize=8)(self._even_routes)

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
        self.mesh.check(plan)
        for name, bank in experts.groups().items():
            if bank.remote:
                check_bank_allows(plan, bank, f"{self.name}.{name}" if name else self.name, self.mesh)

    def _even_routes(self, rows: int, num_experts: int, r: int, algorithm: str, degree: int) -> Routes:
        """Of buffers of `rows` rows for every expert."""
        matrix = even_counts(rows, num_experts, self.mesh, r)
        splits = self.mesh.algorithms[algorithm].known(matrix)
        full_E = torch.full((num_experts,), rows, dtype=torch.int64)
        return Routes(splits, starts_by_rank(full_E, self.mesh), degree, r <= 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # counts decide what is sent
    def __call__(
        self,
        x_TD: Tensor,
        routing: AnyRouting,
        experts: Any,
        combine: Any,
        plan: AnyPlan | None = None,
    ) -> Tensor:
        """The layer's output (T, O) in x's dtype, without shared experts."""
        counts = routing.counts_E.tolist()
        capacity = routing.buffer_capacity if isinstance(routing, CapacityRouting) else None
        plan = self._chosen(self.plan if plan is None else plan, counts, capacity, x_TD.shape[0])
        self.check(plan, experts)
        rows_ND = combine.prepare(gather(x_TD, routing), routing)
        parts, first_expert, first_row = [], 0, 0
        for name, bank in experts.groups().items():
            own = counts[first_expert : first_expert + bank.num_experts]
            first_expert += bank.num_experts
            segment = rows_ND[first_row : first_row + sum(own)]
            first_row += sum(own)
            call = _Call(self, f"{self.name}.{name}" if name else self.name, bank, plan)
            parts.append(call(segment, torch.tensor(own, dtype=torch.int64), capacity))
        past = parts[0].new_zeros(rows_ND.shape[0] - first_row, experts.output_dim)
        dtype = parts[0].dtype
        rows_NO = (
            torch.cat([part.to(dtype) for part in [*parts, past]])
            if len(parts) > 1 or len(past)
            else parts[0]
        )
        y_TO: Tensor = combine(rows_NO, routing, x_TD.dtype)
        return y_TO

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


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of one bank of equal experts."""

    transport: ExpertParallel
    name: str
    bank: Any
    plan: ExecutionPlan

    def __call__(self, rows_ND: Tensor, counts_E: Tensor, capacity: int | None) -> Tensor:
        """Results (N, O) of rows grouped by expert; `counts_E` lies on the host."""
        if not self.bank.remote:
            return _rows(self.bank, rows_ND, counts_E, None)
        with named(self.name):
            return self._run(rows_ND, counts_E, capacity)

    def _run(self, rows_ND: Tensor, counts_E: Tensor, capacity: int | None) -> Tensor:
        rows_ND = rows_ND.to(_compute_dtype(rows_ND))
        mesh, plan = self.transport.mesh, self.plan
        padded = plan.capacity == "padded" and plan.r > 0
        # Before parameters are gathered: ranks with different plans would gather on different groups.
        agreed, splits = self._meet(rows_ND, counts_E, capacity)
        weights = weights_for(self.bank, mesh, plan.r, rows_ND.dtype, self.name)
        if plan.r == 0:
            with phase("experts", len(rows_ND)):
                y_NO = _rows(_Bound(self.bank, None), rows_ND, counts_E, weights)
            return y_NO if len(rows_ND) else _anchored(y_NO, weights)
        if not padded:
            routes = Routes(splits, starts_by_rank(counts_E, mesh), plan.degree, plan.r <= 1)
            return self._travel(rows_ND, routes, weights)
        return self._travel_padded(rows_ND, counts_E, agreed, weights)

    def _travel(self, rows_ND: Tensor, routes: Routes, weights: dict[str, Tensor]) -> Tensor:
        mesh, plan = self.transport.mesh, self.plan
        bound = _Bound(self.bank, None if self.bank.layout() else mesh.experts_of(self.bank.num_experts))

        def compute(rows_RD: Tensor, unit_R: Tensor, counts_e: Tensor, *values: Tensor) -> Tensor:
            return bound.rows(rows_RD, unit_R, counts_e, dict(zip(weights, values, strict=True)))

        exchange = Exchange(
            name=self.name,
            algorithm=mesh.algorithms[plan.algorithm],
            routes=routes,
            codec=plan.codec,
            compute=compute,
            output_dim=self.bank.output_dim,
        )
        return run(exchange, rows_ND, list(weights.values()))

    def _travel_padded(
        self, rows_ND: Tensor, counts_E: Tensor, capacity: int, weights: dict[str, Tensor]
    ) -> Tensor:
        """With every expert's rows in a buffer of `capacity` rows, the rest of it 0."""
        num_experts, plan = self.bank.num_experts, self.plan
        rank_N = torch.arange(rows_ND.shape[0]) - torch.repeat_interleave(
            counts_E.cumsum(0) - counts_E, counts_E
        )
        place_N = torch.repeat_interleave(torch.arange(num_experts), counts_E) * capacity + rank_N
        place_N = place_N.to(rows_ND.device)
        buffer_ND = rows_ND.new_zeros(num_experts * capacity, rows_ND.shape[1]).index_copy(
            0, place_N, rows_ND
        )
        routes = self.transport.even_routes(capacity, num_experts, plan.r, plan.algorithm, plan.degree)
        return self._travel(buffer_ND, routes, weights).index_select(0, place_N)

    def _meet(self, rows_ND: Tensor, counts_E: Tensor, capacity: int | None) -> tuple[int, Any]:
        """Exchange counts, capacity and what must be equal: (capacity of all ranks, splits)."""
        mesh, plan = self.transport.mesh, self.plan
        needed = int(counts_E.max()) if capacity is None else capacity
        known = plan.r == 0 or (plan.capacity == "padded" and capacity is not None)
        if known and not self.transport.verify:
            return needed, None
        # Ranks with different plans must meet in one collective to find out: it is the linear one.
        algorithm = mesh.algorithms["linear" if self.transport.verify else plan.algorithm]
        facts = [
            zlib.crc32(f"{self.name} {self.bank.num_experts} {rows_ND.shape[1]} {rows_ND.dtype}".encode()),
            int(torch.is_grad_enabled()),
            int(rows_ND.requires_grad),
            int(any(p.requires_grad for p in self.bank.parameters())),
            *plan.encode(),
        ]
        header = torch.tensor([needed, *facts])
        counts_Pe = counts_by_rank(counts_E, mesh, plan.r or mesh.slices)
        message_Pc = _widened(counts_Pe, mesh) if self.transport.verify else counts_Pe
        with phase("dispatch wait"):
            headers_PH, splits = algorithm.exchange_counts_with_header(header, message_Pc)
        if self.transport.verify:
            self._compare(headers_PH[:, 1:].tolist())
            splits = splits.of_classes(counts_Pe.shape[1])
            if plan.algorithm != "linear" and plan.capacity == "ragged" and plan.r:
                splits = mesh.algorithms[plan.algorithm].exchange_counts(counts_Pe)
        return int(headers_PH[:, 0].max()), splits

    def _compare(self, facts: list[list[int]]) -> None:
        """Raise where ranks are about to do different things."""
        mesh = self.transport.mesh
        own = facts[mesh.whole.rank]
        others = [(mesh.whole.ranks[i], fact) for i, fact in enumerate(facts) if fact != own]
        if not others:
            return
        rank, other = others[0]
        plans = ExecutionPlan.decode(own[4:]), ExecutionPlan.decode(other[4:])
        if plans[0] != plans[1]:
            raise DistributedError(
                f"{self.name}: rank {torch.distributed.get_rank()} runs {plans[0]}, rank {rank} runs "
                f"{plans[1]}; give every rank the same plan in every call"
            )
        what = "its tokens' or parameters' requires_grad" if own[0] == other[0] else "layer, width or dtype"
        raise DistributedError(
            f"{self.name}: rank {rank} calls with other facts ({what}) than rank "
            f"{torch.distributed.get_rank()}; all ranks must call the same layer in the same order and mode"
        )


class _Bound(nn.Module):
    """A bank with the parameters of one call in place of its own, as `functional_call` wants it.

    Args:
        bank: the experts.
        experts: the ones that rows come for, where the bank holds all of them; None: those of the weights.
    """

    def __init__(self, bank: Any, experts: range | None) -> None:
        super().__init__()
        self.bank, self.experts = bank, experts

    def forward(self, rows_RD: Tensor, unit_R: Tensor, counts_e: Tensor) -> Tensor:
        slot_e = None
        if self.experts is not None:
            slot_e = torch.arange(self.experts.start, self.experts.stop, device=counts_e.device)
        y_RO: Tensor = self.bank.rows(rows_RD, unit_R, counts_e, slot_e)
        return y_RO

    def rows(self, rows_RD: Tensor, unit_R: Tensor, counts_e: Tensor, weights: dict[str, Tensor]) -> Tensor:
        named = {f"bank.{name}": weight for name, weight in weights.items()}
        y_RO: Tensor = functional_call(self, named, (rows_RD, unit_R, counts_e))
        return y_RO


def _rows(bank: Any, rows_ND: Tensor, counts_E: Tensor, weights: dict[str, Tensor] | None) -> Tensor:
    """Results of rows on this rank, in place."""
    unit_N = torch.arange(rows_ND.shape[0], device=rows_ND.device)
    counts_E = counts_E.to(rows_ND.device)
    bound = () if weights is None else (weights,)
    y_NO: Tensor = bank.rows(rows_ND, unit_N, counts_E, *bound)
    return y_NO


def _anchored(y_NO: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The same, of no rows; a bank that then calls no expert would leave the others alone in backward."""
    for weight in weights.values():
        if weight.requires_grad:
            y_NO = y_NO + weight.flatten()[:0].sum().to(y_NO.dtype)
    return y_NO


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What experts compute in, and rows travel in: autocast's dtype where it is on and x is not fp64."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _widened(counts_Pe: Tensor, mesh: ExpertMesh) -> Tensor:
    """With zeros for experts that this bank has not: ranks in unlike layers send messages of one size."""
    most = max(mesh.num_experts // mesh.expert_ranks, counts_Pe.shape[1])
    return torch.nn.functional.pad(counts_Pe, (0, most - counts_Pe.shape[1]))


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
