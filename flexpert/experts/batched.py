"""Equal experts as batched products over buffers of equal size: few launches, whatever the counts are.

Letters: N rows, E experts, C rows of an expert's buffer, D, F and O widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert.core.routing import CapacityRouting, Routing
from flexpert.ops.activations import Activation


def place_of_rows(routing: Routing) -> tuple[Tensor, int]:
    """(int64 (N,), C): the place of each row among E buffers of C rows; E C for rows that are none.

    C is the routing's, or the rows of the busiest expert where it has none; those are read on the host.
    """
    counts_E, rows_N = routing.counts_E, torch.arange(len(routing.unit_N), device=routing.unit_N.device)
    expert_N = routing.expert_N()
    starts_E = counts_E.cumsum(0) - counts_E
    limited = isinstance(routing, CapacityRouting)
    capacity = routing.buffer_capacity if limited else int(counts_E.max())  # type: ignore[attr-defined]
    is_row_N = expert_N < len(counts_E)
    start_N = starts_E[expert_N.clamp(max=len(counts_E) - 1)]
    place_N = expert_N * capacity + torch.where(is_row_N, rows_N - start_N, 0)
    return place_N, capacity


def batched_mlp(
    rows_ND: Tensor,
    place_N: Tensor,
    capacity: int,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    activation: Activation,
    gated: bool,
) -> Tensor:
    """Results (N, O) of rows; what rows without a place get is not to be read.

    Args:
        rows_ND: rows of any experts.
        place_N: of `place_of_rows`.
        capacity: C.
        weights: (w1, b1, w2, b2) of a bank, in the dtype of the rows.
        activation: of the hidden layer.
        gated: w1 is (E, 2, F, D).
    """
    w1, b1, w2, b2 = weights
    experts = len(w1)
    buffer = rows_ND.new_zeros(experts * capacity + 1, rows_ND.shape[1])  # the last one: rows without a place
    x_ECD = buffer.index_copy(0, place_N, rows_ND)[:-1].view(experts, capacity, -1)
    hidden = _linear(x_ECD, w1.flatten(1, -2), None if b1 is None else b1.flatten(1))
    if gated:
        gate_ECF, up_ECF = hidden.chunk(2, dim=-1)
        hidden = activation.forward(gate_ECF) * up_ECF
    else:
        hidden = activation.forward(hidden)
    y_ECO = _linear(hidden, w2, b2)
    return y_ECO.flatten(0, 1).index_select(0, place_N.clamp(max=max(experts * capacity - 1, 0)))


def _linear(x_ECD: Tensor, w_EFD: Tensor, b_EF: Tensor | None) -> Tensor:
    if b_EF is None:
        return torch.bmm(x_ECD, w_EFD.mT)
    return torch.baddbmm(b_EF[:, None], x_ECD, w_EFD.mT)
