"""What one rank sends and receives in an exchange, worked out once for all exchanges that are alike."""

from __future__ import annotations

from collections.abc import Sequence

from .traffic import Links, by_link


class Parts:
    """Rows to and from each position of one group.

    Attributes:
        send, receive: by position.
        leaving, arriving: their sums.
    """

    def __init__(self, send: list[int], receive: list[int]) -> None:
        self.send, self.receive = send, receive
        self.leaving, self.arriving = sum(send), sum(receive)
        self._links: Links | None = None

    def links(self, rank: int, node_of: Sequence[int]) -> Links:
        """Rows and messages that the rank sends inside its node and between nodes."""
        if self._links is None:
            self._links = by_link(self.send, rank, node_of)
        return self._links


def one_each(size: int) -> Parts:
    """One row to and from each of `size` positions."""
    return Parts([1] * size, [1] * size)
