"""The bytes that a plan sends, from the counts of rows: what the counters of a call will say.

Nothing here needs a process group. All ranks are counted at once, so that thousands of them take no longer
than a few sums over the counts.

Letters: W ranks of a mesh, P of one replica, X expert ranks, S slices, E experts, e of them on one rank, N
nodes, L ranks of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flexpert.core.plan import ExecutionPlan

from .codec import CODECS
from .grid import RankGrid
from .layout import tensors_of
from .meeting import HEADER
from .mesh import ExpertMesh
from .rows import RowTraffic


@dataclass
class Bytes:
    """Bytes to ranks of the same node and of others."""

    inside: int = 0
    between: int = 0


@dataclass(frozen=True)
class Part:
    """What one rank holds of a parameter, or of a buffer that is cut as one.

    Attributes:
        numel: elements.
        itemsize: bytes of each, as stored.
        cut: over the slices of an expert; False: whole on each of them.
        shared: whole on every rank of the mesh.
        trained: has a gradient.
        floating: travels in the dtype that experts compute in; else as stored.
    """

    numel: int
    itemsize: int
    cut: bool
    shared: bool = False
    trained: bool = True
    floating: bool = True


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One step of a call's communication, on all ranks of the mesh.

    Attributes:
        name: "counts", "gather", "dispatch", "combine", "scatter" or "average".
        backward: in the backward pass.
        inside_W, between_W: int64, bytes that each rank sends to others of its node and of other nodes.
    """

    name: str
    backward: bool
    inside_W: Tensor
    between_W: Tensor


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
    transfers = transfers_of_call(
        RankGrid.of(mesh),
        parts_of(bank),
        plan,
        counts_PE,
        widths=(bank.model_dim, bank.output_dim),
        dtype=dtype,
        capacity=capacity,
        verify=verify,
        backward=backward,
    )
    rank = mesh.replica * mesh.whole.size + mesh.whole.rank
    return Bytes(
        sum(int(transfer.inside_W[rank]) for transfer in transfers),
        sum(int(transfer.between_W[rank]) for transfer in transfers),
    )


def transfers_of_call(
    grid: RankGrid,
    parts: Sequence[Part],
    plan: ExecutionPlan,
    counts_PE: Tensor,
    *,
    widths: tuple[int, int],
    dtype: torch.dtype,
    capacity: int | None = None,
    verify: bool = True,
    backward: bool = True,
) -> list[Transfer]:
    """What all ranks send in one call of one bank of equal experts, in the order of its steps.

    Args:
        grid: the ranks.
        parts: of the bank's parameters on one rank.
        plan: of the call.
        counts_PE: int64, rows of each rank of a replica for each expert; every replica has the same.
        widths: of a row on its way there, and back.
        dtype: that rows travel and experts compute in.
        capacity: rows of an expert's buffer where the router limits them; None where it does not.
        verify: as in `parallelize`.
        backward: count the backward pass, too, with a gradient for the input.
    """
    experts = counts_PE.shape[1] // grid.expert_ranks
    found = counts_transfers(grid, experts, plan, capacity, verify)
    found += _gathers(grid, parts, plan.r, dtype)
    if plan.r:
        there, back = (wire_bytes(width, dtype, plan.codec) for width in widths)
        traffic = RowTraffic(grid, counts_on_wire(counts_PE, plan, capacity), plan.r)
        for reverse in (False, True) if backward else (False,):
            # Backward sends gradients of results there, of rows back.
            sizes = (back, there) if reverse else (there, back)
            for name, size, way_back in (("dispatch", sizes[0], False), ("combine", sizes[1], True)):
                inside_W, between_W = traffic.sent(plan.algorithm, way_back)
                found.append(
                    Transfer(
                        name=name, backward=reverse, inside_W=inside_W * size, between_W=between_W * size
                    )
                )
    return [*found, *_gradients(grid, parts, plan.r)] if backward else found


def counts_on_wire(counts_PE: Tensor, plan: ExecutionPlan, capacity: int | None) -> Tensor:
    """The rows that travel: those there are, or buffers of equal size."""
    if plan.capacity != "padded":
        return counts_PE
    full = int(counts_PE.max()) if capacity is None else capacity
    return counts_PE.new_full((1, 1), full).expand(counts_PE.shape)


def parts_of(bank: Any) -> list[Part]:
    """What this rank holds of a bank that is laid out."""
    layouts = bank.layout()
    found = []
    for name, tensor in tensors_of(bank).items():
        trained, floating = tensor.requires_grad, tensor.is_floating_point()
        if name in layouts:
            assert isinstance(tensor, DTensor)
            local = tensor.to_local()
            cut = layouts[name].slice_dim is not None
            part = Part(local.numel(), local.element_size(), cut, trained=trained, floating=floating)
            found.append(part)
        elif layouts:
            found.append(Part(tensor.numel(), tensor.element_size(), False, shared=True, trained=trained))
    return found


def wire_bytes(width: int, dtype: torch.dtype, codec: str) -> int:
    """Bytes of one row under way."""
    wire = CODECS[codec].encode(torch.zeros(1, width, dtype=dtype))
    return wire.shape[1] * wire.element_size()


def counts_transfers(
    grid: RankGrid, experts: int, plan: ExecutionPlan, capacity: int | None, verify: bool
) -> list[Transfer]:
    """The counts that travel ahead of the rows, and the header with them."""
    known = plan.r == 0 or (plan.capacity == "padded" and capacity is not None)
    if known and not verify:
        return []
    messages = [("linear" if verify else plan.algorithm, 8 * (HEADER + experts))]
    if verify and plan.algorithm != "linear" and plan.capacity == "ragged" and plan.r:
        messages.append((plan.algorithm, 8 * experts))
    ones = torch.ones(1, 1, dtype=torch.int64).expand(grid.size, grid.expert_ranks)
    traffic = RowTraffic(grid, ones, grid.slices)  # one message for each rank
    found = []
    for algorithm, size in messages:
        inside_W, between_W = traffic.sent(algorithm, False)
        found.append(
            Transfer(name="counts", backward=False, inside_W=inside_W * size, between_W=between_W * size)
        )
    return found


def _gathers(grid: RankGrid, parts: Sequence[Part], r: int, dtype: torch.dtype) -> list[Transfer]:
    """Parameters gathered before the experts."""
    return [
        _to_members(
            grid,
            "gather",
            gathering_group(grid, part, r),
            part.numel * (dtype.itemsize if part.floating else part.itemsize),
        )
        for part in parts
        if not part.shared
    ]


def _gradients(grid: RankGrid, parts: Sequence[Part], r: int) -> list[Transfer]:
    """Their gradients reduced after the experts, and averaged over the ranks with copies."""
    found = []
    for part in parts:
        if not part.trained:
            continue
        if not part.shared:
            size = part.numel * part.itemsize
            found.append(_to_members(grid, "scatter", gathering_group(grid, part, r), size, backward=True))
        found.append(_average(grid, part))
    return found


def gathering_group(grid: RankGrid, part: Part, r: int) -> Tensor:
    """int64 (W,): equal numbers for ranks that gather a part together under r."""
    replica_W, _, slice_W = grid.coordinates()
    if r == 0:
        return replica_W if part.cut else replica_W * grid.slices + slice_W
    if not part.cut:
        return torch.arange(grid.world)
    block = grid.slices // r
    return torch.arange(grid.world) // block


def averaging_group(grid: RankGrid, part: Part) -> Tensor:
    """int64 (W,): equal numbers for ranks that hold copies of a part."""
    _, expert_W, slice_W = grid.coordinates()
    if part.shared:
        return torch.zeros(grid.world, dtype=torch.int64)
    return expert_W * grid.slices + slice_W if part.cut else expert_W


def _to_members(grid: RankGrid, name: str, group_W: Tensor, size: int, *, backward: bool = False) -> Transfer:
    """`size` bytes from each rank to every other of its group."""
    near_W = _sum_by(group_W * (int(grid.node_W.max()) + 1) + grid.node_W, torch.ones_like(group_W)) - 1
    all_W = _sum_by(group_W, torch.ones_like(group_W)) - 1
    return Transfer(name=name, backward=backward, inside_W=near_W * size, between_W=(all_W - near_W) * size)


def _average(grid: RankGrid, part: Part) -> Transfer:
    """All-reduce: to each other rank its portion's summand, and the own portion when summed."""
    group_W = averaging_group(grid, part)
    ones = torch.ones_like(group_W)
    size_W = _sum_by(group_W, ones)
    # Position in the group: members are in order of rank.
    order = torch.argsort(group_W, stable=True)
    first_W = torch.zeros_like(group_W)
    sizes = group_W.unique(return_counts=True)[1]
    first_W[order] = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place_W = torch.empty_like(group_W)
    place_W[order] = torch.arange(grid.world)
    place_W = place_W - first_W
    portion_W = part.numel * (place_W + 1) // size_W - part.numel * place_W // size_W
    portion_W = portion_W * part.itemsize
    near = group_W * (int(grid.node_W.max()) + 1) + grid.node_W
    inside_W = _sum_by(near, portion_W) - portion_W + (_sum_by(near, ones) - 1) * portion_W
    total_W = _sum_by(group_W, portion_W) - portion_W + (size_W - 1) * portion_W
    return Transfer(name="average", backward=True, inside_W=inside_W, between_W=total_W - inside_W)


def _sum_by(key_W: Tensor, value_W: Tensor) -> Tensor:
    """(W,): for each rank the sum of the values of those with its key."""
    total = value_W.new_zeros(int(key_W.max()) + 1).index_add_(0, key_W, value_W)
    return total[key_W]
