"""Collectives that autograd sees, each with its adjoint on the same group.

The loss whose gradient results is the sum of the ranks' losses. All are linear, so derivatives of any order
exist. All ranks must run the backward passes of the same calls in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexpert.core.errors import InputError

from .group import Group
from .timers import phase


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, on every rank. Adjoint: the sum of all ranks' gradients.

    Raises:
        DistributedError: the collective failed, now or in the backward pass.
    """
    total: Tensor = _AllReduce.apply(x, group)
    return total


def all_gather(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """All ranks' x, of equal shapes, joined on `dim`. Adjoint: `reduce_scatter`.

    Raises:
        DistributedError: the collective failed, now or in the backward pass.
    """
    whole: Tensor = _AllGather.apply(x.movedim(dim, 0), group)
    return whole.movedim(0, dim)


def reduce_scatter(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """This rank's part, of equal ones on `dim`, of the sum of all ranks' x. Adjoint: `all_gather`.

    Raises:
        InputError: `dim` does not divide by the number of ranks.
        DistributedError: the collective failed, now or in the backward pass.
    """
    if x.shape[dim] % group.size:
        raise InputError(f"reduce_scatter: {x.shape[dim]} of dim {dim} do not divide by {group.size} ranks")
    part: Tensor = _ReduceScatter.apply(x.movedim(dim, 0), group)
    return part.movedim(0, dim)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        with phase("reduce wait"):
            group.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grads[0], ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        whole = x.new_empty(group.size * x.shape[0], *x.shape[1:])
        group.all_gather(whole, x)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grads[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        part = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
        group.reduce_scatter(part, x)
        return part

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grads[0], ctx.group), None
