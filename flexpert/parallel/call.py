"""One call of one bank of equal experts: ranks compare, parameters are gathered, rows travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flexpert.core.plan import ExecutionPlan
from flexpert.ops.buffers import Buffers

from .bound import rows_with
from .meeting import meet
from .mesh import ExpertMesh
from .pending import named
from .pipeline import Exchange, run
from .routes import Arrivals, PaddedRoutes, RaggedRoutes, Routes
from .switch import Cut, starts_by_rank, weights_for
from .timers import phase


class Layer(Protocol):
    """What a call needs of its layer's transport."""

    mesh: ExpertMesh
    verify: bool

    def even_arrivals(self, rows: int, num_experts: int, r: int, algorithm: str, degree: int) -> Arrivals:
        """Of buffers of `rows` rows for every expert."""

    def cut_of(self, bank: Any) -> Cut:
        """How the tensors of a bank are cut."""


@dataclass(frozen=True)
class Call:
    """One call.

    Args:
        layer: whose it is.
        name: of the bank, for messages.
        bank: the experts.
        plan: how they run.
    """

    layer: Layer
    name: str
    bank: Any
    plan: ExecutionPlan

    def __call__(self, rows_ND: Tensor, counts: list[int], capacity: int | None) -> Tensor:
        """Results (N, O) of rows grouped by expert.

        Args:
            rows_ND: of this rank.
            counts: of each expert.
            capacity: rows of an expert's buffer where the router limits them.
        """
        if not self.bank.remote:
            return self._local(rows_ND, counts, None)
        with named(self.name):
            return self._run(rows_ND, counts, capacity)

    def _run(self, rows_ND: Tensor, counts: list[int], capacity: int | None) -> Tensor:
        dtype = _compute_dtype(rows_ND)
        rows_ND = rows_ND if rows_ND.dtype == dtype else rows_ND.to(dtype)
        mesh, plan = self.layer.mesh, self.plan
        # Before parameters are gathered: ranks with different plans would gather on different groups.
        agreed, splits = meet(self, rows_ND, counts, capacity)
        weights = weights_for(self.bank, self.layer.cut_of(self.bank), plan.r, dtype, self.name)
        if plan.r == 0:
            with phase("experts", len(rows_ND)):
                y_NO = self._local(rows_ND, counts, weights)
            return y_NO if len(rows_ND) else _anchored(y_NO, weights)
        if plan.capacity == "padded":
            return self._travel(rows_ND, self._padded_routes(counts, agreed), weights)
        arrivals = Arrivals(splits, plan.degree)
        routes = RaggedRoutes(arrivals, lambda: starts_by_rank(torch.tensor(counts), mesh), plan.r == 1)
        return self._travel(rows_ND, routes, weights)

    def _travel(self, rows_ND: Tensor, routes: Routes, weights: dict[str, Tensor]) -> Tensor:
        mesh, plan, bank = self.layer.mesh, self.plan, self.bank
        here = None if self.layer.cut_of(bank).layouts else mesh.experts_of(bank.num_experts)

        def compute(rows_RD: Tensor, unit_R: Tensor, counts_e: Tensor, *values: Tensor) -> Tensor:
            slot_e = None if here is None else torch.arange(here.start, here.stop, device=counts_e.device)
            return rows_with(bank, dict(zip(weights, values, strict=True)), rows_RD, unit_R, counts_e, slot_e)

        exchange = Exchange(
            name=self.name,
            algorithm=mesh.algorithms[plan.algorithm],
            routes=routes,
            codec=plan.codec,
            compute=compute,
            output_dim=bank.output_dim,
        )
        return run(exchange, rows_ND, list(weights.values()))

    def _padded_routes(self, counts: list[int], capacity: int) -> Routes:
        """With every expert's rows in a buffer of `capacity` rows."""
        mesh, plan = self.layer.mesh, self.plan
        arrivals = self.layer.even_arrivals(capacity, len(counts), plan.r, plan.algorithm, plan.degree)
        form = Buffers(mesh.expert_ranks, plan.r, capacity, plan.degree)
        return PaddedRoutes(arrivals, form, counts)

    def _local(self, rows_ND: Tensor, counts: list[int], weights: Mapping[str, Tensor] | None) -> Tensor:
        """Results of rows on this rank, in place."""
        unit_N = torch.arange(rows_ND.shape[0], device=rows_ND.device)
        counts_E = torch.tensor(counts, dtype=torch.int64, device=rows_ND.device)
        if weights is None:
            y_NO: Tensor = self.bank.rows(rows_ND, unit_N, counts_E)
            return y_NO
        return rows_with(self.bank, weights, rows_ND, unit_N, counts_E, None)


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
