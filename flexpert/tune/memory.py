"""Bytes of memory that a plan takes on one rank at the peak of a training step, as named parts.

The peak is in backward: while the weighted sum of results is differentiated, which takes four tensors of
their size; while the experts' gradients are computed, with rows under way; or when gathered parameters have
gradients that are about to be reduced.

Letters: T tokens and N rows of this rank, R rows that arrive on it, D, F and O widths, S slices.
"""

from __future__ import annotations

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import counts_on_wire
from flexpert.parallel.rows import RowTraffic

from .volumes import computed_rows
from .workload import DTYPES, LayerShape, Workload

REDUCING = 3  # copies of a gradient on its way: scaled, sorted by rank, and the backend's own
COMBINING = 4  # results, their gradients, those of the tokens by row, and a product of two of them
SCRATCH_KEPT = 64 << 20  # bytes up to which the native CPU kernels keep their scratch from call to call


def memory_of(
    shape: LayerShape, plan: ExecutionPlan, workload: Workload, *, optimizer: bool = True
) -> dict[str, int]:
    """Bytes on the rank that holds most, by what they are for.

    Input and output of the layer and the gradient of the output count as activations. Gradients count as
    there from the start, as they are when several backward passes make a step.

    Args:
        shape: the layer and its ranks.
        plan: of the call.
        workload: its rows.
        optimizer: AdamW keeps two moments of every parameter.

    Returns:
        "parameters", "gradients", "optimizer", "gathered" (parameters), "activations" (kept for backward) and
        "buffers" (of the moment of the peak); their sum is the peak.
    """
    size, held = DTYPES[shape.dtype].itemsize, sum(part.numel * part.itemsize for part in shape.parts)
    whole = shape.params_per_expert * size
    computed = shape.num_experts * whole if plan.r == 0 else shape.local_experts * whole // plan.r
    alone = plan.r != 0 and plan.r == shape.slices  # parameters are used where they lie
    cast = shape.dtype != shape.parameter_dtype
    gathered = computed if not alone or cast else 0
    outside = size * workload.tokens * (shape.model_dim + 2 * shape.output_dim)  # x, y and the gradient of y
    kept, rows, combined = _travelling_rows(shape, plan, workload) if plan.r else _local_rows(shape, workload)
    scratch = scratch_of(shape, plan, workload)
    largest = computed * shape.inputs * shape.model_dim // (shape.inputs * shape.model_dim + shape.output_dim)
    reduced = computed + (0 if alone else REDUCING * largest)
    # The operators keep their scratch from the call before.
    combining = COMBINING * combined * size + min(scratch, SCRATCH_KEPT)
    first, second = kept * size + max(combining, rows * size + computed + scratch), reduced
    parts = {
        "parameters": held,
        "gradients": held,
        "optimizer": 2 * held if optimizer else 0,
        "gathered": gathered,
    }
    if first >= second:
        return parts | {"activations": outside + kept * size, "buffers": first - kept * size}
    return parts | {"activations": outside, "buffers": second}


def scratch_of(shape: LayerShape, plan: ExecutionPlan, workload: Workload) -> int:
    """Bytes of the operators' own: rows, hidden rows and their gradients, of the expert with most of them."""
    most = int(computed_rows(shape, plan, workload).max())
    rows = -(-most // plan.degree) if plan.r else most
    size, hidden = DTYPES[shape.dtype].itemsize, shape.hidden_dim // max(plan.r, 1)
    forward = rows * size * (shape.model_dim + hidden)
    backward = rows * size * (shape.model_dim + shape.output_dim + (1 + shape.inputs) * hidden)
    return backward + (forward if backward > SCRATCH_KEPT >= forward else 0)


def _local_rows(shape: LayerShape, workload: Workload) -> tuple[int, int, int]:
    """Elements (kept for backward, of the experts' buffers, of results) where no row travels."""
    rows = int(workload.rows_PE.sum(1).max())
    kept = rows * (shape.model_dim + shape.inputs * shape.hidden_dim)
    return kept, rows * (shape.output_dim + 2 * shape.model_dim), rows * shape.output_dim


def _travelling_rows(shape: LayerShape, plan: ExecutionPlan, workload: Workload) -> tuple[int, int, int]:
    """The same where they do: of the rank that computes most."""
    counts = counts_on_wire(workload.rows_PE, plan, workload.capacity)
    traffic = RowTraffic(shape.grid, counts, plan.r)
    arrived = int(traffic.received_P.max())
    own = int(counts.sum(1)[int(traffic.received_P.argmax())])
    hidden = shape.inputs * shape.hidden_dim // plan.r
    kept = arrived * (shape.model_dim + shape.output_dim + hidden)
    # Gradients of results: of own rows, as they arrive, and as other chunks hold them that still travel (a
    # chunk's are free once it has arrived); then of the rows that arrived, by row and summed.
    travelling = plan.r * (1 + 2 * (plan.algorithm != "linear")) * (1 - 1 / plan.degree)
    copies = travelling + (plan.capacity == "padded")  # in a buffer, and as they were
    buffers = int(own * shape.output_dim * (1 + copies)) + arrived * shape.output_dim
    results = int(workload.rows_PE.sum(1).max()) * shape.output_dim
    return kept, buffers + 2 * -(-arrived // plan.degree) * shape.model_dim, results
