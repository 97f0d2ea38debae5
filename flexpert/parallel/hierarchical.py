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
from functools import cached_property

import torch
from torch import Tensor

from flexpert.core.errors import DistributedError, InputError

from .all_to_all import AllToAll
from .group import Group
from .parts import Parts, one_each
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

    @cached_property
    def forth(self) -> Phase:
        """Inside the node, forward: from rows by (node, place) of the destination."""
        return Phase(self._sent_NL, self._relayed_LN)

    @cached_property
    def forth_between(self) -> Phase:
        """Between nodes, forward: to rows by (node, place) of the source."""
        return Phase(self._relayed_LN, self._received_NL)

    @cached_property
    def back_between(self) -> Phase:
        """Between nodes, back."""
        return Phase(transposed(self._received_NL), transposed(self._relayed_LN), aligned=True)

    @cached_property
    def back(self) -> Phase:
        """Inside the node, back: to rows by (place, node) of the destination."""
        return Phase(transposed(self._relayed_LN), self._sent_LN)

    @cached_property
    def align_back(self) -> Alignment:
        """Back, in the end: from rows by (place, node) of the destination to those by (node, place)."""
        return Alignment(self._sent_LN)

    @cached_property
    def _sent_LN(self) -> Counts:
        return transposed(self._sent_NL)

    @cached_property
    def _sent_NL(self) -> Counts:
        return _grid(self.forward.send, len(self.relayed))

    @cached_property
    def _received_NL(self) -> Counts:
        return _grid(self.forward.receive, len(self.relayed))

    @cached_property
    def _relayed_LN(self) -> Counts:
        return [row_totals(counts) for counts in self.relayed]

    def _cut(self, chunk: int, degree: int) -> HierarchicalSplits:
        return HierarchicalSplits(
            chunk_counts(self.sent, chunk, degree),
            chunk_counts(self.received, chunk, degree),
            [chunk_counts(counts, chunk, degree) for counts in self.relayed],
        )


class Phase:
    """The rows of one of the two exchanges.

    Args:
        sent_AB: of the rows as they lie, which are sent by b after they are brought into order of (b, a).
        received_BA: of those that arrive, by b.
        aligned: the rows lie in order of (b, a) already.
    """

    def __init__(self, sent_AB: Counts, received_BA: Counts, *, aligned: bool = False) -> None:
        self._align = None if aligned else Alignment(sent_AB)
        send = row_totals(transposed(sent_AB)) if self._align is None else self._align.send
        self._parts = Parts(send, row_totals(received_BA))

    def start(self, group: Group, rows: Tensor, chunk: int) -> tuple[Tensor, Pending]:
        """Send rows: (those that will arrive, work)."""
        arriving = rows.new_empty(self._parts.arriving, *rows.shape[1:])
        source = rows if self._align is None else self._align(rows)
        return arriving, group.exchange(arriving, source, self._parts, chunk)


class Alignment:
    """Segments in order of (a, b) brought into that of (b, a).

    Args:
        sizes_AB: rows of each segment.

    Attributes:
        send: how many of the first dimension of the result are for each b.
    """

    def __init__(self, sizes_AB: Counts) -> None:
        self._shape = len(sizes_AB), len(sizes_AB[0])
        self._sizes = [size for row in sizes_AB for size in row]
        self._lie_so = 1 in self._shape
        self._equal = not self._lie_so and min(self._sizes) == max(self._sizes)
        self.send = [1] * self._shape[1] if self._equal else row_totals(transposed(sizes_AB))

    def __call__(self, rows: Tensor) -> Tensor:
        """The rows in the other order; a strided view (b, a, size, ...) of them where all sizes are equal."""
        first, second = self._shape
        if self._lie_so:
            return rows
        if self._equal:
            return rows.reshape(first, second, self._sizes[0], *rows.shape[1:]).transpose(0, 1)
        segments = rows.split(self._sizes)
        return torch.cat([segments[a * second + b] for b in range(second) for a in range(first)])


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

    def exchange_messages(  # noqa: D102 - as inherited
        self, message_PV: Tensor, header: int
    ) -> tuple[list[list[int]], Splits]:
        nodes, places = self.between.size, self.inside.size
        message_NLV = message_PV.view(nodes, places, -1)
        relayed_LNV = torch.empty_like(message_NLV.transpose(0, 1), memory_format=torch.contiguous_format)
        self.inside.exchange(relayed_LNV, message_NLV.transpose(0, 1), one_each(places)).wait()
        received_NLV = torch.empty_like(message_NLV)
        self.between.exchange(received_NLV, relayed_LNV.transpose(0, 1), one_each(nodes)).wait()
        received = received_NLV.view_as(message_PV).tolist()
        splits = HierarchicalSplits(
            [row[header:] for row in message_PV.tolist()],
            [row[header:] for row in received],
            [[row[header:] for row in place] for place in relayed_LNV.tolist()],
        )
        return [row[:header] for row in received], splits

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
        relayed, pending = part.forth.start(self.inside, wire, chunk)
        del wire  # what is under way, `pending` holds
        yield pending
        output, pending = part.forth_between.start(self.between, relayed, chunk)
        del relayed
        yield pending
        return output

    def _back(self, wire: Tensor, part: HierarchicalSplits, chunk: int) -> Phases:
        """The same backwards."""
        relayed, pending = part.back_between.start(self.between, wire, chunk)
        del wire
        yield pending
        output, pending = part.back.start(self.inside, relayed, chunk)
        del relayed
        yield pending
        return part.align_back(output).reshape(output.shape)


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


def _grid(totals_P: list[int], places: int) -> Counts:
    """Rows by (node, place)."""
    return [totals_P[start : start + places] for start in range(0, len(totals_P), places)]


def transposed(counts_AB: Counts) -> Counts:
    """Counts by (b, a)."""
    return [list(column) for column in zip(*counts_AB, strict=True)]
