"""The bytes that a plan sends, from the counts of rows: what the counters of a call will say.

Letters: P ranks that exchange rows, e experts of one rank, X expert ranks, S slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flexpert.core.plan import ExecutionPlan

from .codec import CODECS
from .group import Group
from .layout import tensors_of
from .mesh import ExpertMesh
from .switch import block_size, destinations
from .transport import HEADER


@dataclass
class Bytes:
    """Bytes to ranks of the same node and of others."""

    inside: int = 0
    between: int = 0

    def add(self, group: Group, sizes: Sequence[int]) -> None:
        """Count `sizes[p]` bytes to each other position p of a group."""
        for position, size in enumerate(sizes):
            if position == group.rank:
                continue
            if group.node_of[position] == group.node_of[group.rank]:
                self.inside += size
            else:
                self.between += size


def bytes_of_call(
    mesh: ExpertMesh,
    bank: Any,
    plan: ExecutionPlan,
    counts_PE: Tensor,
    *,
    dtype: torch.dtype,
    capacity: int | None = None,
    verify: bool = True,
    backward: bool = True,
) -> Bytes:
    """What this rank sends in one call of one bank of equal experts.

    Args:
        mesh: the ranks.
        bank: laid out over them.
        plan: of the call.
        counts_PE: int64, rows of each rank for each expert.
        dtype: that rows travel and experts compute in.
        capacity: rows of an expert's buffer where the router limits them; None where it does not.
        verify: as in `parallelize`.
        backward: count the backward pass, too, with a gradient for the input.
    """
    sent = Bytes()
    passes = 2 if backward else 1
    _add_counts(sent, mesh, bank, plan, capacity, verify)
    _add_parameters(sent, mesh, bank, plan.r, dtype, backward)
    if plan.r:
        rows_PPe = rows_between(mesh, bank.num_experts, plan, counts_PE, capacity)
        row = _wire_bytes(bank.model_dim, dtype, plan.codec), _wire_bytes(bank.output_dim, dtype, plan.codec)
        for chunk in range(plan.degree):
            part_PP = rows_PPe * (chunk + 1) // plan.degree - rows_PPe * chunk // plan.degree
            for _ in range(passes):  # backward sends gradients of results there, of rows back
                there, back = row if _ == 0 else row[::-1]
                _add_rows(sent, mesh, plan.algorithm, part_PP.sum(2), there, back)
    return sent


def rows_between(
    mesh: ExpertMesh, num_experts: int, plan: ExecutionPlan, counts_PE: Tensor, capacity: int | None
) -> Tensor:
    """int64 (P, P, e): rows from each rank to each, for each expert there."""
    size = mesh.whole.size
    if plan.capacity == "padded":
        full = int(counts_PE.max()) if capacity is None else capacity
        counts_PE = torch.full_like(counts_PE, full)
    counts_PXe = counts_PE.view(size, mesh.expert_ranks, 1, num_experts // mesh.expert_ranks)
    rows = counts_PXe.expand(-1, -1, mesh.slices, -1).reshape(size, size, -1)
    chosen_PP = torch.tensor([destinations(mesh, plan.r, source) for source in range(size)])
    return rows * chosen_PP[:, :, None]


def _add_counts(
    sent: Bytes, mesh: ExpertMesh, bank: Any, plan: ExecutionPlan, capacity: int | None, verify: bool
) -> None:
    """The counts that travel ahead of the rows, and the header with them."""
    known = plan.r == 0 or (plan.capacity == "padded" and capacity is not None)
    if known and not verify:
        return
    experts = bank.num_experts // mesh.expert_ranks
    first = "linear" if verify else plan.algorithm
    _add_messages(sent, mesh, first, 8 * (HEADER + experts))
    if verify and plan.algorithm != "linear" and plan.capacity == "ragged" and plan.r:
        _add_messages(sent, mesh, plan.algorithm, 8 * experts)


def _add_messages(sent: Bytes, mesh: ExpertMesh, algorithm: str, size: int) -> None:
    """One message of equal size for every rank."""
    ones = torch.ones(mesh.whole.size, mesh.whole.size, dtype=torch.int64)
    _add_exchange(sent, mesh, algorithm, ones, size)


def _add_rows(sent: Bytes, mesh: ExpertMesh, algorithm: str, rows_PP: Tensor, there: int, back: int) -> None:
    _add_exchange(sent, mesh, algorithm, rows_PP, there)
    _add_exchange(sent, mesh, algorithm, rows_PP, back, reverse=True)


def _add_exchange(
    sent: Bytes, mesh: ExpertMesh, algorithm: str, rows_PP: Tensor, row: int, reverse: bool = False
) -> None:
    """Rows from each rank to each; in reverse they go back, over the same intermediate ranks."""
    rank = mesh.whole.rank
    if algorithm == "linear":
        own = rows_PP[:, rank] if reverse else rows_PP[rank]
        sent.add(mesh.whole, [row * n for n in own.tolist()])
        return
    hierarchical: Any = mesh.algorithms["2dh"]
    inside, between = hierarchical.inside, hierarchical.between
    local = inside.size
    node, place = divmod(rank, local)
    rows_NLNL = rows_PP.view(-1, local, mesh.whole.size // local, local)
    if reverse:  # first between the nodes to the source's node, then inside it
        sent.add(between, [row * int(n) for n in rows_NLNL[:, :, node, place].sum(1)])
        sent.add(inside, [row * int(n) for n in rows_NLNL[node, :, :, place].sum(1)])
    else:
        sent.add(inside, [row * int(n) for n in rows_NLNL[node, place].sum(0)])
        sent.add(between, [row * int(n) for n in rows_NLNL[node, :, :, place].sum(0)])


def _add_parameters(
    sent: Bytes, mesh: ExpertMesh, bank: Any, r: int, dtype: torch.dtype, backward: bool
) -> None:
    """Gathered before the experts, reduced after them, averaged over the ranks with copies."""
    layouts = bank.layout()
    for name, parameter in tensors_of(bank).items():
        if name not in layouts:
            if layouts and backward:
                _add_average(sent, mesh.everyone, parameter)
            continue
        assert isinstance(parameter, DTensor)
        local, cut = parameter.to_local(), layouts[name].slice_dim is not None
        group = mesh.column if r == 0 else None
        if cut:
            group = mesh.whole if r == 0 else mesh.blocks[block_size(mesh, r)]
        trained = backward and parameter.requires_grad
        if group is not None:
            item = dtype.itemsize if local.is_floating_point() else local.element_size()
            sent.add(group, [local.numel() * item] * group.size)
            if trained:
                sent.add(group, [local.nbytes] * group.size)
        if trained:
            _add_average(sent, mesh.same_slice if cut else mesh.same_expert, local)


def _add_average(sent: Bytes, group: Group, tensor: Tensor) -> None:
    edges = [tensor.numel() * p // group.size for p in range(group.size + 1)]
    portions = [(stop - start) * tensor.element_size() for start, stop in pairwise(edges)]
    sent.add(group, [portion + portions[group.rank] for portion in portions])


def _wire_bytes(width: int, dtype: torch.dtype, codec: str) -> int:
    wire = CODECS[codec].encode(torch.zeros(1, width, dtype=dtype))
    return wire.shape[1] * wire.element_size()
