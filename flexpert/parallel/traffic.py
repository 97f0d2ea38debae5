"""What this rank sends: bytes and messages, per collective and kind of link.

Counted is the plain algorithm of each collective, not what a backend makes of it, so the numbers are exact,
equal on every backend, and comparable between methods. To each other rank p of a group of n ranks, this rank
sends
- all_to_all: the part of its input for p;
- all_gather: its shard;
- reduce_scatter: its summand of p's portion;
- all_reduce of x: its summand of p's portion and, when summed, its own portion, where the portion of position
  p is elements floor(size p / n) to floor(size (p + 1) / n): over all ranks 2 (n - 1) times the bytes of x.
What a rank keeps for itself is not counted, and an empty part is no message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Counter:
    """Bytes and messages on one kind of link."""

    bytes: int = 0
    messages: int = 0


Links = tuple[Counter, Counter]  # inside the node, between nodes


class Traffic:
    """Counters of what this rank has sent inside its node and between nodes, by operation.

    Groups may share one. Attributes:
        by_operation: from the name of a collective to its counters (inside, between).
    """

    def __init__(self) -> None:
        self.by_operation: dict[str, Links] = defaultdict(lambda: (Counter(), Counter()))

    def add(self, operation: str, bytes_P: Sequence[int], rank: int, node_of: Sequence[int]) -> None:
        """Count one message of `bytes_P[p]` bytes to each position p but `rank`, where that is not 0."""
        self.add_rows(operation, by_link(bytes_P, rank, node_of), 1)

    def add_rows(self, operation: str, rows: Links, row_bytes: int) -> None:
        """Count messages of rows of so many bytes."""
        for counter, sent in zip(self.by_operation[operation], rows, strict=True):
            counter.bytes += sent.bytes * row_bytes
            counter.messages += sent.messages if row_bytes else 0

    @property
    def inside(self) -> int:
        """Bytes to ranks of the same node."""
        return sum(inside.bytes for inside, _ in self.by_operation.values())

    @property
    def between(self) -> int:
        """Bytes to ranks of other nodes."""
        return sum(between.bytes for _, between in self.by_operation.values())

    def reset(self) -> None:
        """Set all counters to 0."""
        self.by_operation.clear()

    def snapshot(self) -> dict[str, dict[str, dict[str, int]]]:
        """The counters now: operation, then "inside" or "between", then "bytes" or "messages"."""
        return {
            operation: {
                link: {"bytes": counter.bytes, "messages": counter.messages}
                for link, counter in zip(("inside", "between"), counters, strict=True)
            }
            for operation, counters in self.by_operation.items()
        }


def by_link(bytes_P: Sequence[int], rank: int, node_of: Sequence[int]) -> Links:
    """What a message of `bytes_P[p]` bytes to each position p but `rank` sends over each kind of link."""
    links = Counter(), Counter()
    for position, size in enumerate(bytes_P):
        if size and position != rank:
            counter = links[node_of[position] != node_of[rank]]
            counter.bytes += size
            counter.messages += 1
    return links
