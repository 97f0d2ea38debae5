"""Parameters of one call: the parts that ranks hold gathered, and their gradients reduced again.

All small ones of a group travel in one message, and all collectives are started before one is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .group import Group, Pending
from .pending import named

SMALL = 1 << 18  # bytes of a part up to which copying it costs less than messages of its own


@dataclass(frozen=True)
class Part:
    """How a parameter's parts (e, ..., f, ...) are joined.

    Attributes:
        group: ranks (X, slices) that gather it; None: nobody does.
        slices: neighbours whose parts are joined on `dim`; the results are joined on dimension 0.
        dim: see there.
        scale: of the gradient, after it is summed over the group.
        nothing: zeros in its place.
    """

    group: Group | None
    slices: int
    dim: int
    scale: float
    nothing: bool = False

    @property
    def travels(self) -> bool:
        """Whether there is anything to gather."""
        return self.group is not None and self.group.size > 1


def gathered(
    locals_: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype, name: str
) -> Sequence[Tensor]:
    """The whole parameters, floating ones in `dtype`. Backward: this rank's part of the summed gradients.

    Args:
        locals_: this rank's parts.
        parts: what to do with each.
        dtype: to compute in.
        name: of them, for messages.
    """
    if torch.is_grad_enabled() and any(local.requires_grad for local in locals_):
        wholes: Sequence[Tensor] = _Gather.apply(parts, dtype, name, *locals_)
        return wholes
    return _gather(locals_, parts, dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Part], dtype: torch.dtype, name: str, *locals_: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.parts, ctx.name, ctx.dtypes = parts, name, [local.dtype for local in locals_]
        wholes = _gather([local.detach() for local in locals_], parts, dtype)
        ctx.mark_non_differentiable(*(whole for whole in wholes if not whole.is_floating_point()))
        return tuple(wholes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        parts = [ctx.parts[i] for i in wanted]
        with named(f"{ctx.name} (backward)"):
            reduced = _reduce([grads[i].to(ctx.dtypes[i]) for i in wanted], parts)
        results: list[Tensor | None] = [None] * len(grads)
        for i, gradient in zip(wanted, reduced, strict=True):
            results[i] = gradient
        return None, None, None, *results


def _gather(locals_: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype) -> list[Tensor]:
    cast = [local.to(dtype) if local.is_floating_point() else local for local in locals_]

    def start(group: Group, members: list[Tensor]) -> tuple[Pending, Tensor]:
        flat = members[0] if len(members) == 1 else torch.cat(members, 1)
        arriving = flat.new_empty(group.size, flat.shape[1])
        return group.all_gather(arriving, flat, async_op=True), arriving

    arrived = _together([local.reshape(1, -1) for local in cast], parts, start)
    wholes = []
    for part, local, table in zip(parts, cast, arrived, strict=True):
        if part.nothing:
            wholes.append(torch.zeros_like(local))
        elif table is None:
            wholes.append(local.contiguous())
        elif part.slices == 1:
            wholes.append(table.reshape(-1, *local.shape[1:]))
        else:
            pieces = table.view(-1, part.slices, *local.shape).unbind(1)
            wholes.append(torch.cat(pieces, dim=part.dim + 1).flatten(0, 1))
    return wholes


def _reduce(grads: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """This rank's part of each gradient, summed over its group, times the scale."""
    scaled = [
        torch.zeros_like(grad) if part.nothing else grad * part.scale
        for grad, part in zip(grads, parts, strict=True)
    ]
    tables, shapes = [], []
    for grad, part in zip(scaled, parts, strict=True):
        pieces, size = grad[None], 1
        if part.group is not None and part.travels:
            size = part.group.size
            of_experts = grad.view(size // part.slices, -1, *grad.shape[1:])
            pieces = torch.stack(of_experts.chunk(part.slices, dim=part.dim + 1), dim=1).flatten(0, 1)
        tables.append(pieces.reshape(size, -1))
        shapes.append(pieces.shape[1:])

    def start(group: Group, members: list[Tensor]) -> tuple[Pending, Tensor]:
        flat = members[0] if len(members) == 1 else torch.cat(members, 1)
        own = flat.new_empty(1, flat.shape[1])
        return group.reduce_scatter(own, flat, async_op=True), own

    reduced = _together(tables, parts, start)
    return [
        grad if own is None else own.reshape(shape)
        for grad, own, shape in zip(scaled, reduced, shapes, strict=True)
    ]


def _together(
    tables: Sequence[Tensor],
    parts: Sequence[Part],
    start: Callable[[Group, list[Tensor]], tuple[Pending, Tensor]],
) -> list[Tensor | None]:
    """For each table (rows, n) that travels the n columns of what `start` brings for those in its message."""
    messages: dict[Any, list[int]] = {}
    for place, (table, part) in enumerate(zip(tables, parts, strict=True)):
        if part.travels:
            alone = place if table[0].nbytes > SMALL else None
            messages.setdefault((part.group, table.dtype, alone), []).append(place)
    started = [
        (places, *start(key[0], [tables[place] for place in places])) for key, places in messages.items()
    ]
    arrived: list[Tensor | None] = [None] * len(tables)
    for places, pending, brought in started:
        pending.wait()
        columns = brought.split([tables[place].shape[1] for place in places], 1)
        for place, column in zip(places, columns, strict=True):
            arrived[place] = column
    return arrived
