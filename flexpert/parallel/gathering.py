"""Parameters of one call: the parts that ranks hold gathered, and their gradients reduced again.

All small ones of a group travel in one message, and all collectives are started before one is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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
    tensors: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype, name: str
) -> Sequence[Tensor]:
    """The whole parameters, floating ones in `dtype`. Backward: this rank's part of the summed gradients.

    Args:
        tensors: this rank's parts, as DTensors or by themselves.
        parts: what to do with each.
        dtype: to compute in.
        name: of them, for messages.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        wholes: Sequence[Tensor] = _Gather.apply(parts, dtype, name, *tensors)
        return wholes
    return _gather(list(map(local_part, tensors)), parts, dtype)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, without gradient; another tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Part], dtype: torch.dtype, name: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.parts, ctx.name, ctx.dtypes = parts, name, [tensor.dtype for tensor in tensors]
        # A gradient is cut as its parameter: `to_local` and its backward would work that out anew each time.
        ctx.specs = [tensor._spec if isinstance(tensor, DTensor) else None for tensor in tensors]
        wholes = _gather([local_part(tensor).detach() for tensor in tensors], parts, dtype)
        fixed = [whole for whole, needed in zip(wholes, ctx.needs_input_grad[3:], strict=True) if not needed]
        ctx.mark_non_differentiable(*fixed)  # frozen parameters, and buffers: modules may write to theirs
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
            spec = ctx.specs[i]
            results[i] = gradient if spec is None else DTensor(gradient, copy(spec), requires_grad=False)
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
        elif lies_joined(local.shape, part):
            before, after = local.shape[: part.dim], local.shape[part.dim + 1 :]
            joined = part.slices * local.shape[part.dim]
            shape = (*before, joined, *after) if part.dim else local.shape
            wholes.append(table.reshape(-1, *shape[1:]))
        else:
            pieces = table.view(-1, part.slices, *local.shape).unbind(1)
            wholes.append(torch.cat(pieces, dim=part.dim + 1).flatten(0, 1))
    return wholes


def lies_joined(shape: Sequence[int], part: Part) -> bool:
    """Whether parts of this shape, one after the other, are the joined parameter already."""
    return part.slices == 1 or math.prod(shape[: part.dim]) == 1


def _reduce(grads: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """This rank's part of each gradient, summed over its group, times the scale."""
    tables, shapes = [], []
    for grad, part in zip(grads, parts, strict=True):
        table, shape, size = grad, list(grad.shape), 1
        if part.group is not None and part.travels:
            size = part.group.size
            shape[0] //= size // part.slices
            shape[part.dim] //= part.slices
            if not lies_joined(shape, part):
                of_experts = grad.view(size // part.slices, -1, *grad.shape[1:])
                table = torch.stack(of_experts.chunk(part.slices, dim=part.dim + 1), dim=1)
        tables.append(table.reshape(size, -1))
        shapes.append(shape)

    def start(group: Group, members: list[Tensor]) -> tuple[Pending, Tensor]:
        flat = members[0] if len(members) == 1 else torch.cat(members, 1)
        own = flat.new_empty(1, flat.shape[1])
        return group.reduce_scatter(own, flat, async_op=True), own

    reduced = _together(tables, parts, start)
    results = []
    for grad, own, part, shape in zip(grads, reduced, parts, shapes, strict=True):
        if part.nothing:
            results.append(torch.zeros_like(grad))
        else:
            results.append((grad if own is None else own.reshape(shape)) * part.scale)
    return results


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
