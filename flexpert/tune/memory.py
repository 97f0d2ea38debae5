"""Bytes of memory that a plan takes on one rank, as named parts.

Letters: N rows of this rank, R rows that arrive on it, D, F and O widths, S slices.
"""

from __future__ import annotations

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import counts_on_wire
from flexpert.parallel.rows import RowTraffic

from .workload import DTYPES, LayerShape, Workload


def memory_of(
    shape: LayerShape, plan: ExecutionPlan, workload: Workload, *, optimizer: bool = True
) -> dict[str, int]:
    """Bytes on the rank that holds most, by what they are for.

    Args:
        shape: the layer and its ranks.
        plan: of the call.
        workload: its rows.
        optimizer: AdamW keeps two moments of every parameter.
    """
    held = sum(part.numel * part.itemsize for part in shape.parts)
    size = DTYPES[shape.dtype].itemsize
    rows = int(workload.rows_PE.sum(1).max())
    arrived, gathered = rows, 0
    if plan.r == 0:
        gathered = shape.num_experts * shape.params_per_expert * size
    else:
        counts = counts_on_wire(workload.rows_PE, plan, workload.capacity)
        arrived = int(RowTraffic(shape.grid, counts, plan.r).received_P.max())
        if plan.r < shape.slices:
            gathered = shape.local_experts * shape.params_per_expert * size // plan.r
    hidden = shape.inputs * shape.hidden_dim // (plan.r or 1)
    return {
        "parameters": held,
        "gradients": held,
        "optimizer": 2 * held if optimizer else 0,
        "gathered parameters": gathered,
        "activations": size * (rows * shape.model_dim + arrived * (shape.model_dim + hidden)),
        "buffers": size * arrived * (shape.output_dim + hidden),
    }
