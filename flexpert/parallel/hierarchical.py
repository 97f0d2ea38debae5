"""Two-dimensional hierarchical all-to-all: few large messages between nodes in place of many small ones.

Tutel, arXiv 2206.03382, section 3.4 and algorithm 2, and here for uneven parts as well. Position p = node L +
l of P ranks on nodes of L:
1. align the parts by l of their destination; exchange inside the node, so that the rank at l has all that the
   node sends to ranks at l anywhere;
2. align by node of the destination; exchange between the ranks at l of all nodes.
A rank so sends L - 1 + P / L - 1 messages instead of P - 1. The way back is the mirror image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.core.errors import DistributedError, InputError

from .all_to_all import AllToAll
from .group import Group
from .pending import Pending
from .splits import Counts, Splits, chunk_counts, row_totals

Phases = Generator[Pending, None, Tensor]  # what to wait for before going on, and the rows in the end


@dataclass(frozen=True)
class HierarchicalSplits(Splits):
    """The rows of one exchange, and those that this rank passes on.

    Attributes:
        relayed: rows from each rank of this node (L) to the rank at this one's place on each node (P / L), by
            class: [source][node][class].
    """

    relayed: list[Counts]

    def chunk(self, chunk: int, degree: int) -> HierarchicalSplits:
        """The rows of one chunk, of `degree`."""
        return HierarchicalSplits(
            chunk_counts(self.sent, chunk, degree),
            chunk_counts(self.received, chunk, degree),
            [chunk_counts(counts, chunk, degree) for counts in self.relayed],
        )


class Hierarchical(AllToAll):
    """The all-to-all in two phases: inside nodes, then between them; back, between them first.

    The second phase of an exchange needs the first one's result. It is issued by the next `wait()` of an
    exchange of the same direction: forward for all exchanges that were started, so that the slow phases of
    later chunks run while the first is used; back for those up to the one waited for, whose second phase is
    the fast one. So the order of collectives depends on nothing but that of the calls.

    Args:
        group: all P ranks.
        inside: the L ranks of this rank's node: positions node L to node L + L - 1.
        between: the ranks at this one's place on each node: positions l, l + L, l + 2 L, ...

    Raises:
        DistributedError: the groups are not made like that.
    """

    name = "2dh"

    def __init__(self, group: Group, inside: Group, between: Group) -> None:
        super().__init__(group)
        node, place = divmod(group.rank, inside.size)
        wanted = group.ranks[node * inside.size : (node + 1) * inside.size], group.ranks[place :: inside.size]
        if (inside.ranks, between.ranks) != wanted or inside.size * between.size != group.size:
            raise DistributedError(
                f"2dh on ranks {group.ranks}: rank {group.ranks[group.rank]} has inside={inside.ranks} and "
                f"between={between.ranks}; {wanted[0]} and {wanted[1]} expected"
            )
        self.inside = inside
        self.between = between
        self._started: dict[bool, deque[_Exchange]] = {False: deque(), True: deque()}

    def _exchange_messages(self, message_PV: Tensor, header: int) -> tuple[Tensor, Splits]:
        nodes, places = self.between.size, self.inside.size
        message_NLV = message_PV.view(nodes, places, -1)
        relayed_LNV = torch.empty_like(message_NLV.transpose(0, 1), memory_format=torch.contiguous_format)
        self.inside.all_to_all(relayed_LNV, message_NLV.transpose(0, 1))
        received_NLV = torch.empty_like(message_NLV)
        self.between.all_to_all(received_NLV, relayed_LNV.transpose(0, 1))
        received_PV = received_NLV.view_as(message_PV)
        splits = HierarchicalSplits(
            message_PV[:, header:].tolist(),
            received_PV[:, header:].tolist(),
            relayed_LNV[..., header:].tolist(),
        )
        return received_PV[:, :header], splits

    def known(self, matrix_PPC: Tensor) -> Splits:  # noqa: D102 - as inherited
        rank, places = self.group.rank, self.inside.size
        node, place = divmod(rank, places)
        relayed_LNC = matrix_PPC[node * places : (node + 1) * places, place::places]
        return HierarchicalSplits(
            matrix_PPC[rank].tolist(), matrix_PPC[:, rank].tolist(), relayed_LNC.tolist()
        )

    def _start(self, wire: Tensor, part: Splits, chunk: int, reverse: bool) -> Callable[[], Tensor]:
        if not isinstance(part, HierarchicalSplits):
            raise InputError("2dh needs splits made by a 2dh: others do not tell what a rank passes on")
        started = self._started[reverse]
        exchange = _Exchange((self._back if reverse else self._forth)(wire, part, chunk))
        started.append(exchange)

        def arrive() -> Tensor:
            while started and (not reverse or exchange in started):
                started.popleft().advance()
            return exchange.arrive()

        return arrive

    def _forth(self, wire: Tensor, part: HierarchicalSplits, chunk: int) -> Phases:
        """From rows by (node, place) of the destination to rows by (node, place) of the source."""
        sent_NL, received_NL = self._grid(part.sent), self._grid(part.received)
        relayed_LN = [row_totals(counts) for counts in part.relayed]
        sizes = row_totals(relayed_LN), row_totals(transposed(sent_NL))
        relayed = wire.new_empty(sum(sizes[0]), *wire.shape[1:])
        yield self.inside.all_to_all(relayed, align(wire, sent_NL), *sizes, True, chunk=chunk)
        sizes = row_totals(received_NL), row_totals(transposed(relayed_LN))
        output = wire.new_empty(sum(sizes[0]), *wire.shape[1:])
        yield self.between.all_to_all(output, align(relayed, relayed_LN), *sizes, True, chunk=chunk)
        return output

    def _back(self, wire: Tensor, part: HierarchicalSplits, chunk: int) -> Phases:
        """The same backwards."""
        sent_LN, received_NL = transposed(self._grid(part.sent)), self._grid(part.received)
        relayed_NL = transposed([row_totals(counts) for counts in part.relayed])
        sizes = row_totals(relayed_NL), row_totals(received_NL)
        relayed = wire.new_empty(sum(sizes[0]), *wire.shape[1:])
        yield self.between.all_to_all(relayed, wire, *sizes, True, chunk=chunk)
        sizes = row_totals(sent_LN), row_totals(transposed(relayed_NL))
        output = wire.new_empty(sum(sizes[0]), *wire.shape[1:])
        yield self.inside.all_to_all(output, align(relayed, relayed_NL), *sizes, True, chunk=chunk)
        return align(output, sent_LN)

    def _grid(self, counts_PC: Counts) -> Counts:
        """Rows of all classes by (node, place)."""
        totals, places = row_totals(counts_PC), self.inside.size
        return [totals[start : start + places] for start in range(0, len(totals), places)]


class _Exchange:
    """One chunk under way: phases that each need the result of the one before."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._pending = next(phases)

    def advance(self) -> None:
        """Wait for the first phase and issue the second."""
        self._pending.wait()
        self._pending = next(self._phases)

    def arrive(self) -> Tensor:
        """Wait for the second phase: the rows."""
        self._pending.wait()
        try:
            next(self._phases)
        except StopIteration as end:
            rows: Tensor = end.value
            return rows
        raise AssertionError("an exchange has two phases")


def transposed(counts_AB: Counts) -> Counts:
    """Counts by (b, a)."""
    return [list(column) for column in zip(*counts_AB, strict=True)]


def align(rows: Tensor, sizes_AB: Counts) -> Tensor:
    """Segments in order of (a, b) brought into that of (b, a): one strided copy where all are equal."""
    first, second = len(sizes_AB), len(sizes_AB[0])
    if first == 1 or second == 1:
        return rows
    sizes = [size for row in sizes_AB for size in row]
    if min(sizes) == max(sizes):
        shape = rows.shape[1:]
        return rows.reshape(first, second, sizes[0], *shape).transpose(0, 1).reshape(-1, *shape)
    segments = rows.split(sizes)
    return torch.cat([segments[a * second + b] for b in range(second) for a in range(first)])
