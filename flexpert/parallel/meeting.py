"""What ranks tell each other before rows travel: how many they send, and what must be equal on all."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexpert.core.errors import DistributedError
from flexpert.core.plan import ExecutionPlan

from .layout import tensors_of
from .mesh import ExpertMesh
from .switch import destinations
from .timers import phase

if TYPE_CHECKING:
    from .call import Call

HEADER = 11  # numbers beside the counts: the capacity, facts and plan


def meet(call: Call, rows_ND: Tensor, counts: list[int], capacity: int | None) -> tuple[int, Any]:
    """Exchange counts, capacity and what must be equal: (capacity of all ranks, splits).

    Raises:
        DistributedError: the ranks are about to do different things.
    """
    mesh, plan, verify = call.layer.mesh, call.plan, call.layer.verify
    needed = max(counts) if capacity is None else capacity
    if not verify and (plan.r == 0 or (plan.capacity == "padded" and capacity is not None)):
        return needed, None
    # Ranks with different plans must meet in one collective to find out: it is the linear one.
    algorithm = mesh.algorithms["linear" if verify else plan.algorithm]
    layouts = call.layer.cut_of(call.bank).layouts
    facts = [
        _digest(call.name, call.bank.num_experts, rows_ND.shape[1], rows_ND.dtype),
        int(torch.is_grad_enabled()),
        int(rows_ND.requires_grad),
        int(any(tensor.requires_grad for tensor in tensors_of(call.bank, layouts).values())),
        *plan.encode(),
    ]
    counts_Pe = by_rank(counts, mesh, plan.r or mesh.slices)
    classes = len(counts_Pe[0])
    # Ranks in unlike layers must send messages of one size.
    spare = max(mesh.num_experts // mesh.expert_ranks - classes, 0) if verify else 0
    message_PV = torch.tensor([[needed, *facts, *own, *[0] * spare] for own in counts_Pe])
    with phase("dispatch wait"):
        headers, splits = algorithm.exchange_messages(message_PV, HEADER)
    if verify:
        compare(call.name, mesh, [header[1:] for header in headers])
        splits = splits.of_classes(classes) if spare else splits
        if plan.algorithm != "linear" and plan.capacity == "ragged" and plan.r:
            splits = mesh.algorithms[plan.algorithm].exchange_counts(torch.tensor(counts_Pe))
    return max(header[0] for header in headers), splits


def by_rank(counts: list[int], mesh: ExpertMesh, r: int) -> list[list[int]]:
    """(P, e): the rows that this rank sends to each rank for each of the experts there."""
    each = len(counts) // mesh.expert_ranks
    none = [0] * each
    chosen_P = destinations(mesh, r, mesh.whole.rank)
    return [
        counts[place // mesh.slices * each :][:each] if chosen else none
        for place, chosen in enumerate(chosen_P)
    ]


@lru_cache(maxsize=256)
def _digest(name: str, num_experts: int, width: int, dtype: torch.dtype) -> int:
    return zlib.crc32(f"{name} {num_experts} {width} {dtype}".encode())


def compare(name: str, mesh: ExpertMesh, facts: list[list[int]]) -> None:
    """Raise where ranks are about to do different things.

    Raises:
        DistributedError: with the first rank that differs from this one, and in what.
    """
    own = facts[mesh.whole.rank]
    others = [(mesh.whole.ranks[i], fact) for i, fact in enumerate(facts) if fact != own]
    if not others:
        return
    rank, other = others[0]
    plans = ExecutionPlan.decode(own[4:]), ExecutionPlan.decode(other[4:])
    if plans[0] != plans[1]:
        raise DistributedError(
            f"{name}: rank {torch.distributed.get_rank()} runs {plans[0]}, rank {rank} runs "
            f"{plans[1]}; give every rank the same plan in every call"
        )
    what = "its tokens' or parameters' requires_grad" if own[0] == other[0] else "layer, width or dtype"
    raise DistributedError(
        f"{name}: rank {rank} calls with other facts ({what}) than rank "
        f"{torch.distributed.get_rank()}; all ranks must call the same layer in the same order and mode"
    )
