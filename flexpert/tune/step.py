"""The time of one call, phase by phase, in the order in which a call goes through them.

Letters: P ranks of a replica, E experts, e of them on one rank, B slices of a block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import Transfer, averaging_group, counts_on_wire, gathering_group
from flexpert.parallel.rows import RowTraffic

from .collectives import Clock
from .machine import Machine
from .pipeline import pipeline
from .workload import LayerShape, Workload


def time_of(
    shape: LayerShape,
    plan: ExecutionPlan,
    workload: Workload,
    machine: Machine,
    transfers: Sequence[Transfer],
    *,
    backward: bool = True,
) -> tuple[dict[str, float], float]:
    """(seconds by phase, seconds of the call); phases of a pipeline overlap."""
    clock, overheads = Clock(shape, machine), machine.overheads
    parts: defaultdict[str, float] = defaultdict(float)
    hidden = 0.0  # by which the pipelines are shorter than the sum of their phases
    computed_PC = computed_rows(shape, plan, workload)
    sent, computed = (float(rows.sum(1).double().mean()) for rows in (workload.rows_PE, computed_PC))
    for transfer in transfers:
        if transfer.name == "counts":
            # With `verify` the first message goes directly.
            first = "linear" if shape.verify and not parts["counts"] else plan.algorithm
            parts["counts"] += clock.exchange(transfer, transfer, first)
    _add_parameters(parts, shape, plan, machine, transfers)
    for reverse in (False, True) if backward else (False,):
        call, chunk, token = (
            (overheads.call_backward, overheads.chunk_backward, overheads.token_backward)
            if reverse
            else (overheads.call, overheads.chunk, overheads.token)
        )
        chunks = plan.degree - 1 if plan.r else 0
        parts["router"] += clock.everyone(token * workload.tokens)
        parts["calls"] += clock.everyone(call + chunks * chunk)
        parts["rows"] += clock.rows(sent * max(plan.r, 1), computed, reverse)
        compute = clock.products(computed_PC, plan, reverse) + (clock.sums(plan) if reverse else 0.0)
        parts["experts"] += compute
        if plan.r == 0:
            continue
        there, back = (
            next(t for t in transfers if (t.name, t.backward) == (name, reverse))
            for name in ("dispatch", "combine")
        )
        times = [clock.exchange(a, b, plan.algorithm, plan.degree) for a, b in ((there, back), (back, there))]
        parts["dispatch"] += times[0]
        parts["combine"] += times[1]
        hidden += sum(times) + compute - pipeline(times[0], compute, times[1], plan.degree, machine.overlap)
    return dict(parts), sum(parts.values()) - hidden


def _add_parameters(
    parts: dict[str, float],
    shape: LayerShape,
    plan: ExecutionPlan,
    machine: Machine,
    transfers: Sequence[Transfer],
) -> None:
    """Gathering parameters, reducing their gradients, averaging these."""
    clock = Clock(shape, machine)
    passes_of = {
        "gather": 1.0,
        "scatter": machine.reduce_scatter,
        "average": 2.0,
    }
    for name, passes in passes_of.items():
        of_name = [transfer for transfer in transfers if transfer.name == name]
        for part, transfer in zip(shape.parts, of_name, strict=False):
            if name == "average":
                group_W = averaging_group(shape.grid, part)
            else:
                group_W = gathering_group(shape.grid, part, plan.r)
            size = int((group_W == group_W[0]).sum())
            if size == 1:
                continue
            parts[name] += clock.collective(transfer, group_W, passes)
            if name != "average":  # joined from the parts that arrive, or cut and sorted into them
                parts[name] += clock.copy(4 * size * part.numel * part.itemsize)


def computed_rows(shape: LayerShape, plan: ExecutionPlan, workload: Workload) -> Tensor:
    """int64 (P, e) for r >= 1, (P, E) for r = 0: rows that each rank computes for each of its experts."""
    if plan.r == 0:
        return workload.rows_PE
    rows_PE = counts_on_wire(workload.rows_PE, plan, workload.capacity)
    block = shape.slices // plan.r
    rows_BE = RowTraffic.by_class(rows_PE, block)
    place_P = torch.arange(shape.ranks)
    rows_BXe = rows_BE.unflatten(1, (shape.expert_ranks, -1))
    return rows_BXe[place_P % shape.slices % block, place_P // shape.slices]
