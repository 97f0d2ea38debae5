"""Which rows of one exchange go where, chunk by chunk, worked out once.

Letters: P ranks, e experts of one rank, R rows that arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .splits import Splits, chunk_of, segments


class Routes:
    """The rows of an exchange and their places on both sides; remembered for calls that exchange the same.

    Args:
        splits: rows from and to each rank.
        starts_PE: int64 (P, e), where the rows for each rank and expert begin among this rank's rows.
        degree: chunks.
        in_order: this rank's rows lie as they are sent, each going to one rank.
    """

    def __init__(self, splits: Splits, starts_PE: Tensor, degree: int, in_order: bool) -> None:
        self.splits, self.starts_PE = splits, starts_PE
        self.degree, self.in_order = degree, in_order
        self._sent: dict[int, Tensor] = {}
        self._arrived: dict[int, tuple[Tensor, Tensor]] = {}

    def send_index(self, chunk: int) -> Tensor | None:
        """int64: the rows of a chunk in order of sending; None: all rows as they lie."""
        if self.in_order and self.degree == 1:
            return None
        if chunk not in self._sent:
            first, counts = chunk_of(torch.tensor(self.splits.sent), chunk, self.degree)
            self._sent[chunk] = segments(self.starts_PE + first, counts)
        return self._sent[chunk]

    def arrivals(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Of a chunk's rows by (source rank, expert): int64 (R,), them grouped by expert, and counts (e,)."""
        if chunk not in self._arrived:
            _, counts_Pe = chunk_of(torch.tensor(self.splits.received), chunk, self.degree)
            starts = (counts_Pe.flatten().cumsum(0) - counts_Pe.flatten()).view_as(counts_Pe)
            self._arrived[chunk] = segments(starts.T, counts_Pe.T), counts_Pe.sum(0)
        return self._arrived[chunk]
