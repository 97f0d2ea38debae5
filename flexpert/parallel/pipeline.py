"""One call's dispatch, experts and combine over the ranks, in chunks that travel while others are computed.

It is one autograd Function with a fixed order of collectives, empty chunks included, so that ranks cannot
disagree in backward, whatever the autograd engine does around it. (Tutel, arXiv 2206.03382, section 3.2.)

Letters: N rows of this rank, R rows that arrive on it, D and O widths, P ranks, e experts of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codec import CODECS
from .mesh import Algorithm
from .pending import named
from .routes import Routes, beside
from .timeline import Timeline, active_timeline
from .timers import phase

# (rows_RD, unit_R, counts_e, *weights) -> (R, O): the experts' results in the rows' places
Compute = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What one call does between the ranks.

    Attributes:
        name: of the layer, for messages.
        algorithm: of the all-to-all.
        routes: which rows go where, and in how many chunks.
        codec: name of the rows' form on the wire.
        compute: the experts of this rank.
        output_dim: O.
    """

    name: str
    algorithm: Algorithm
    routes: Routes
    codec: str
    compute: Compute
    output_dim: int

    def start(self, rows: Tensor, chunk: int, reverse: bool = False) -> Any:
        """Send the rows of a chunk on their way."""
        return self.algorithm.start(
            rows,
            self.routes.splits,
            chunk=chunk,
            degree=self.routes.degree,
            reverse=reverse,
            codec=CODECS[self.codec],
        )


def run(exchange: Exchange, rows_ND: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The experts' results (N, O) for rows grouped by expert, wherever the experts are."""
    if torch.is_grad_enabled() and (rows_ND.requires_grad or any(w.requires_grad for w in weights)):
        y_NO: Tensor = _Run.apply(exchange, rows_ND, *weights)
        return y_NO
    with torch.no_grad():
        return _forward(exchange, rows_ND, weights, None)


def _forward(exchange: Exchange, rows_ND: Tensor, leaves: Sequence[Tensor], ctx: Any | None) -> Tensor:
    """The results; `ctx` gets what backward needs."""
    routes, wants_rows = exchange.routes, ctx is not None and ctx.needs_input_grad[1]
    chunks = range(routes.degree)
    sent = [exchange.start(routes.take(rows_ND, chunk), chunk) for chunk in chunks]
    arrivals = [routes.arrivals.of(chunk) for chunk in chunks]  # worked out while rows are under way
    kept, returning = [], []
    for chunk in chunks:
        with phase("dispatch wait"):
            arrived_RD = sent[chunk].wait()
        if wants_rows:
            arrived_RD.requires_grad_()
        with torch.set_grad_enabled(ctx is not None), _span("experts", chunk, len(arrived_RD)):
            y_RO = _experts(exchange, arrived_RD, leaves, arrivals[chunk])
        if ctx is not None:
            kept.append((arrived_RD, y_RO))
        returning.append(exchange.start(y_RO.detach(), chunk, reverse=True))
    with phase("combine wait"):
        back = [rows.wait() for rows in returning]
    if ctx is not None:
        ctx.chunks = kept
    return routes.put(back, rows_ND.shape[0], rows_ND.dtype)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, rows_ND: Tensor, *weights: Tensor) -> Tensor:
        leaves = [w.detach().requires_grad_(w.requires_grad) for w in weights]
        ctx.exchange, ctx.leaves = exchange, leaves
        ctx.num_rows, ctx.dtype = rows_ND.shape[0], rows_ND.dtype
        return _forward(exchange, rows_ND, leaves, ctx)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        with named(f"{ctx.exchange.name} (backward)"):
            return _backward(ctx, grad_NO)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
    exchange: Exchange = ctx.exchange
    routes = exchange.routes
    chunks = range(routes.degree)
    sent = [exchange.start(routes.take(grad_NO, chunk), chunk) for chunk in chunks]
    gradients: list[Tensor | None] = [None] * len(ctx.leaves)
    returning = []
    for chunk in chunks:
        (arrived_RD, y_RO), ctx.chunks[chunk] = ctx.chunks[chunk], None
        with phase("dispatch wait"):
            grad_RO, sent[chunk] = sent[chunk].wait(), None
        with _span("experts backward", chunk):
            grad_RD, *of_leaves = _differentiate(y_RO, grad_RO, arrived_RD, ctx.leaves)
        gradients = [_add(a, b) for a, b in zip(gradients, of_leaves, strict=True)]
        if grad_RD is not None:
            returning.append(exchange.start(grad_RD, chunk, reverse=True))
        del arrived_RD, y_RO, grad_RO, grad_RD  # nothing else holds them while the next chunk is computed
    with phase("combine wait"):
        back = [rows.wait() for rows in returning]
    grad_ND = routes.put(back, ctx.num_rows, ctx.dtype) if back else None
    # Zeros in place of None: a rank without rows takes part in the reductions of the others.
    return None, grad_ND, *map(_or_zeros, gradients, ctx.leaves)


def _experts(
    exchange: Exchange, rows_RD: Tensor, leaves: Sequence[Tensor], arrivals: tuple[Tensor, Tensor]
) -> Tensor:
    """Results (R, O) of rows ordered by (source rank, expert), in that order."""
    if rows_RD.shape[0] == 0:
        return rows_RD.new_empty(0, exchange.output_dim)
    unit_R, counts_e = arrivals
    y_RO = exchange.compute(rows_RD, beside(unit_R, rows_RD), beside(counts_e, rows_RD), *leaves)
    return y_RO.to(rows_RD.dtype)


def _differentiate(
    y_RO: Tensor, grad_RO: Tensor, rows_RD: Tensor, leaves: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of the rows and the leaves; None where none is wanted, or a leaf has none."""
    inputs = [rows_RD, *leaves]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found: Iterator[Tensor | None] = iter([None] * len(wanted))
    if y_RO.requires_grad:  # else no rows, or experts that have no parameters and ignore their input
        found = iter(torch.autograd.grad(y_RO, wanted, grad_RO.to(y_RO.dtype), allow_unused=True))
    grad_RD, *of_leaves = [next(found) if tensor.requires_grad else None for tensor in inputs]
    if grad_RD is None and rows_RD.requires_grad:
        grad_RD = torch.zeros_like(rows_RD)
    return [grad_RD, *of_leaves]


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more  # not in place: autograd may hand out one tensor twice


def _or_zeros(gradient: Tensor | None, leaf: Tensor) -> Tensor | None:
    return torch.zeros_like(leaf) if gradient is None and leaf.requires_grad else gradient


def _span(name: str, chunk: int, rows: int = 0) -> AbstractContextManager[None]:
    timeline = active_timeline()
    return phase("experts", rows) if timeline is None else _recorded(timeline, name, chunk, rows)


@contextmanager
def _recorded(timeline: Timeline, name: str, chunk: int, rows: int) -> Iterator[None]:
    with timeline.span(name, chunk), phase("experts", rows):
        yield
