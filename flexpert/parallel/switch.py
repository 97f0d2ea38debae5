"""Switching r: which parameters a rank gathers for a call, and which ranks its rows go to.

Letters: E experts of a group, e of them on one rank, S slices, X expert ranks, P = X S ranks that exchange
rows.
With r >= 1 the S slices of an expert form r blocks of S / r neighbours. A block gathers its slices, so that
each of its members computes one r-th of the hidden dimension; the blocks together compute all of it, and the
sources are dealt out over the members.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flexpert.core.layout import ParamLayout

from .group import Group
from .layout import Bank, tensors_of
from .mesh import ExpertMesh
from .pending import named


def block_size(mesh: ExpertMesh, r: int) -> int:
    """S / r: neighbouring slices that gather their parameters; S for r = 0."""
    return mesh.slices // max(r, 1)


def weights_for(
    bank: Bank, mesh: ExpertMesh, r: int, dtype: torch.dtype, layer: str = "experts"
) -> dict[str, Tensor]:
    """The parameters that this rank computes with under r, in `dtype`, differentiable, and the buffers.

    Those of its e experts for r >= 1, of all E for r = 0. Their gradients arrive at the bank's own parameters
    as the sum over the replica's ranks, divided so that the mean over the ranks with equal copies is
    (1 / W) * the sum over all W ranks.
    """
    layouts = bank.layout()
    return {
        name: _gathered(p, layouts[name], mesh, r, dtype, f"{layer}.{name}") if name in layouts else p
        for name, p in tensors_of(bank).items()
    }


def _gathered(
    parameter: Any, layout: ParamLayout, mesh: ExpertMesh, r: int, dtype: torch.dtype, name: str
) -> Tensor:
    assert isinstance(parameter, DTensor)
    local = parameter.to_local()
    dtype = dtype if local.is_floating_point() else local.dtype
    if layout.slice_dim is None:
        group = mesh.column if r == 0 else None
        whole: Tensor = _Gather.apply(local, dtype, group, 1, 0, 1.0 / mesh.expert_ranks, name)
        if not layout.once or r <= 1 or mesh.slice < block_size(mesh, r):
            return whole
        return whole.masked_fill(whole.new_ones((), dtype=torch.bool), 0.0)  # added by another block
    size = block_size(mesh, r)
    group = mesh.whole if r == 0 else mesh.blocks[size]
    joined: Tensor = _Gather.apply(local, dtype, group, size, layout.slice_dim, 1.0 / mesh.whole.size, name)
    return joined


class _Gather(torch.autograd.Function):
    """All-gather of parts (e, ..., f, ...); backward: reduce-scatter, times a scale.

    The group's ranks are (X, slices); parts of neighbouring slices are joined on `dim`, the results on the
    expert dimension 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        dtype: torch.dtype,
        group: Group | None,
        slices: int,
        dim: int,
        scale: float,
        name: str,
    ) -> Tensor:
        ctx.name = name
        ctx.dtype, ctx.group, ctx.slices, ctx.dim, ctx.scale = local.dtype, group, slices, dim, scale
        part = local.detach().to(dtype).contiguous()
        if group is None or group.size == 1:
            return part.view_as(part)
        parts = part.new_empty(group.size * part.shape[0], *part.shape[1:])
        group.all_gather(parts, part).wait()
        if slices == 1:
            return parts
        pieces = parts.view(-1, slices, *part.shape).unbind(1)
        return torch.cat(pieces, dim=dim + 1).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.to(ctx.dtype) * ctx.scale
        group = ctx.group
        if group is not None and group.size > 1:
            ranks = group.size // ctx.slices
            parts = grad.view(ranks, -1, *grad.shape[1:])
            pieces = torch.stack(parts.chunk(ctx.slices, dim=ctx.dim + 1), dim=1).flatten(0, 2)
            grad = pieces.new_empty(pieces.shape[0] // group.size, *pieces.shape[1:])
            with named(f"{ctx.name} (backward)"):
                group.reduce_scatter(grad, pieces).wait()
        return grad, None, None, None, None, None, None


def destinations(mesh: ExpertMesh, r: int, source: int) -> list[bool]:
    """For each of the P ranks whether the source at this position sends it the rows of its experts."""
    size = block_size(mesh, r)
    return [(place % mesh.slices) % size == source % size for place in range(mesh.whole.size)]


def counts_by_rank(counts_E: Tensor, mesh: ExpertMesh, r: int) -> Tensor:
    """int64 (P, e): the rows that this rank sends to each rank for each of the experts there."""
    counts_XSe = counts_E.view(mesh.expert_ranks, 1, -1).expand(-1, mesh.slices, -1)
    chosen_P = torch.tensor(destinations(mesh, r, mesh.whole.rank), device=counts_E.device)
    return counts_XSe.reshape(mesh.whole.size, -1) * chosen_P[:, None]


def even_counts(rows: int, num_experts: int, mesh: ExpertMesh, r: int) -> Tensor:
    """int64 (P, P, e): rows from each rank to each for each expert there, every expert having `rows`."""
    size = mesh.whole.size
    chosen_PP = torch.tensor([destinations(mesh, r, source) for source in range(size)])
    each = num_experts // mesh.expert_ranks
    return (chosen_PP.long() * rows)[:, :, None].expand(size, size, each).contiguous()


def starts_by_rank(counts_E: Tensor, mesh: ExpertMesh) -> Tensor:
    """int64 (P, e): where the rows of each rank's experts begin among rows grouped by expert."""
    starts_E = counts_E.cumsum(0) - counts_E
    starts_XSe = starts_E.view(mesh.expert_ranks, 1, -1).expand(-1, mesh.slices, -1)
    return starts_XSe.reshape(mesh.whole.size, -1)
