"""The time of one call, phase by phase, in the order in which a call goes through them."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import wire_bytes

from .collectives import Clock
from .pipeline import pipeline
from .volumes import Volumes
from .workload import DTYPES, Workload


class Times:
    """Times of one load of a layer under every plan; what plans have in common is computed once.

    Args:
        clock: of the layer on a machine.
        workload: its rows.
        volumes: of it, where they were counted before.
    """

    def __init__(self, clock: Clock, workload: Workload, volumes: Volumes | None = None) -> None:
        self.clock, self.workload = clock, workload
        self.volumes = Volumes(clock.shape, workload) if volumes is None else volumes
        self._experts = lru_cache(maxsize=None)(self._products)
        self._travels = lru_cache(maxsize=None)(self._travel)

    def of(self, plan: ExecutionPlan, *, backward: bool = True) -> tuple[dict[str, float], float]:
        """(seconds by phase, seconds of the call); phases of a pipeline overlap."""
        clock, volumes = self.clock, self.volumes
        overheads = clock.machine.overheads
        parts: defaultdict[str, float] = defaultdict(float)
        parts["counts"] = clock.counts(plan.r > 0, plan.algorithm, plan.capacity, self.workload.capacity)
        of_parameters = clock.parameters(plan.r)
        for name in ("gather", "scatter", "average") if backward else ("gather",):
            parts[name] = of_parameters[name]
        computed = float(volumes.computed(plan.r, plan.capacity).sum(1).double().mean())
        hidden = 0.0  # by which the pipelines are shorter than the sum of their phases
        for reverse in (False, True) if backward else (False,):
            call, chunk, token = (
                (overheads.call_backward, overheads.chunk_backward, overheads.token_backward)
                if reverse
                else (overheads.call, overheads.chunk, overheads.token)
            )
            chunks = plan.degree - 1 if plan.r else 0
            parts["router"] += clock.everyone(token * self.workload.tokens)
            parts["calls"] += clock.everyone(call + chunks * chunk)
            cut = plan.r > 1 or (plan.r == 1 and plan.degree > 1)
            parts["rows"] += clock.rows(volumes.sent * max(plan.r, 1), computed, cut, reverse)
            experts = self._experts(plan.r, plan.degree, plan.capacity, reverse)
            parts["experts"] += experts
            if plan.r == 0:
                continue
            ways = self._travels(plan.r, plan.capacity, plan.algorithm, plan.degree, plan.codec)
            dispatch, combine = ways[::-1] if reverse else ways
            parts["dispatch"] += dispatch
            parts["combine"] += combine
            hidden += dispatch + experts + combine
            # What messages cost of a shared processor hides nothing.
            busy = clock.busy_sending(plan.algorithm, plan.degree)
            there, back = max(dispatch - busy, 0.0), max(combine - busy, 0.0)
            hidden -= dispatch - there + combine - back
            hidden -= pipeline(there, experts, back, plan.degree, clock.machine.overlap)
        return dict(parts), sum(parts.values()) - hidden

    def _products(self, r: int, degree: int, capacity: str, reverse: bool) -> float:
        plan = ExecutionPlan(r=r, degree=degree, capacity=capacity)
        rows_PC = self.volumes.computed(r, capacity)
        return self.clock.products(rows_PC, plan, reverse) + (self.clock.sums(plan) if reverse else 0.0)

    def _travel(self, r: int, capacity: str, algorithm: str, degree: int, codec: str) -> tuple[float, float]:
        """Of rows as wide as the model, and as the results."""
        shape = self.clock.shape
        rows = self.volumes.exchanged(r, capacity, algorithm)
        sizes = [
            wire_bytes(width, DTYPES[shape.dtype], codec) for width in (shape.model_dim, shape.output_dim)
        ]
        there, back = (self.clock.exchange(rows.times(size), algorithm, degree) for size in sizes)
        return there, back
