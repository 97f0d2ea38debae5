"""Dispatch: a routing's rows from tokens, and the weighted sum back to tokens.

Letters: T tokens, N rows, B sequences of S tokens, P slots of soft routing, D and O widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexpert import ops
from flexpert.core.autocast import without_autocast
from flexpert.core.routing import AnyRouting, DenseRouting


def gather(x_TD: Tensor, routing: AnyRouting) -> Tensor:
    """The rows for the experts (N, D), grouped by expert; 0 past the real rows."""
    if isinstance(routing, DenseRouting):
        return _gather_dense(x_TD, routing)
    return ops.gather_rows(x_TD, routing.unit_N, routing.counts_E)


def scatter(
    rows_NO: Tensor, routing: AnyRouting, dtype: torch.dtype, weight_N: Tensor | None = None
) -> Tensor:
    """Sum each token's rows by weight: (T, O) in `dtype`, accumulated in fp32 (fp64 for fp64).

    Args:
        rows_NO: results of the experts.
        routing: as given to `gather`.
        dtype: of the result.
        weight_N: weights in place of the routing's; not for soft routing.
    """
    if isinstance(routing, DenseRouting):
        return _scatter_dense(rows_NO, routing, dtype)
    weight_N = routing.weight_N if weight_N is None else weight_N
    return ops.scatter_combine(rows_NO, routing.unit_N, weight_N, routing.counts_E, routing.num_units, dtype)


def _gather_dense(x_TD: Tensor, routing: DenseRouting) -> Tensor:
    batch, length, _ = routing.dispatch_BSP.shape
    x_BSD = x_TD.view(batch, length, x_TD.shape[-1])
    with without_autocast(x_TD.device):
        slots_PBD = torch.einsum("bsp,bsd->pbd", routing.dispatch_BSP, x_BSD.to(routing.dispatch_BSP.dtype))
    return slots_PBD.flatten(0, 1).to(x_TD.dtype)


def _scatter_dense(rows_NO: Tensor, routing: DenseRouting, dtype: torch.dtype) -> Tensor:
    batch, _, slots = routing.combine_BSP.shape
    rows_PBO = rows_NO.view(slots, batch, rows_NO.shape[-1]).to(routing.combine_BSP.dtype)
    with without_autocast(rows_NO.device):
        y_BSO = torch.einsum("bsp,pbo->bso", routing.combine_BSP, rows_PBO)
    return y_BSO.flatten(0, 1).to(dtype)
