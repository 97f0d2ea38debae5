"""Which rows of one exchange go where, chunk by chunk, worked out once.

Letters: P ranks, e experts of one rank, R rows that arrive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .splits import Splits, chunk_of, segments


class Routes:
    """The rows of an exchange and their places on both sides; remembered for calls that exchange the same.

    Args:
        splits: rows from and to each rank.
        starts: gives int64 (P, e), where the rows for each rank and expert begin among this rank's rows.
        degree: chunks.
        in_order: this rank's rows lie as they are sent, each going to one rank.
    """

    def __init__(self, splits: Splits, starts: Callable[[], Tensor], degree: int, in_order: bool) -> None:
        self.splits, self.starts = splits, starts
        self.degree, self.in_order = degree, in_order
        self._sent: dict[int, Tensor] = {}
        self._copies: Tensor | None = None
        self._arrived: dict[int, tuple[Tensor, Tensor]] = {}

    def send_index(self, chunk: int) -> Tensor | None:
        """int64: the rows of a chunk in order of sending; None: all rows as they lie."""
        if self.in_order and self.degree == 1:
            return None
        if chunk not in self._sent:
            first, counts = chunk_of(torch.tensor(self.splits.sent), chunk, self.degree)
            self._sent[chunk] = segments(self.starts() + first, counts)
        return self._sent[chunk]

    def copies(self, rows: int) -> Tensor:
        """int64 (r, N): where the copies of each row lie among the rows of all chunks in order of sending."""
        if self._copies is None:
            index = [self.send_index(chunk) for chunk in range(self.degree)]
            sent = torch.cat([part for part in index if part is not None])
            each = len(sent) // max(rows, 1)
            self._copies = sent.argsort(stable=True).view(rows, each).T.contiguous()
        return self._copies

    def arrivals(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Of a chunk's rows by (source rank, expert): int64 (R,), them grouped by expert, and counts (e,)."""
        if chunk not in self._arrived:
            received = self.splits.received
            if self.degree == 1 and received and len(received[0]) == 1:  # of one expert: they lie grouped
                total = self.splits.forward.arriving
                self._arrived[chunk] = torch.arange(total), torch.tensor([total])
                return self._arrived[chunk]
            _, counts_Pe = chunk_of(torch.tensor(self.splits.received), chunk, self.degree)
            starts = (counts_Pe.flatten().cumsum(0) - counts_Pe.flatten()).view_as(counts_Pe)
            self._arrived[chunk] = segments(starts.T, counts_Pe.T), counts_Pe.sum(0)
        return self._arrived[chunk]
