"""Which rows of one exchange go where, chunk by chunk, worked out once.

Letters: P ranks, e experts of one rank, N rows of this rank, R rows that arrive, M rows that are sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexpert import ops
from flexpert.ops.buffers import Buffers, from_buffers, to_buffers

from .splits import Splits, chunk_of, segments


class Arrivals:
    """The rows that arrive on this rank; remembered for calls that exchange the same.

    Args:
        splits: rows from and to each rank.
        degree: chunks.
    """

    def __init__(self, splits: Splits, degree: int) -> None:
        self.splits, self.degree = splits, degree
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Of a chunk's rows by (source rank, expert): int64 (R,), them grouped by expert, and counts (e,)."""
        if chunk not in self._known:
            self._known[chunk] = self._work_out(chunk)
        return self._known[chunk]

    def _work_out(self, chunk: int) -> tuple[Tensor, Tensor]:
        received = self.splits.received
        if self.degree == 1 and received and len(received[0]) == 1:  # of one expert: they lie grouped
            total = self.splits.forward.arriving
            return torch.arange(total), torch.tensor([total])
        _, counts_Pe = chunk_of(torch.tensor(received), chunk, self.degree)
        starts = (counts_Pe.flatten().cumsum(0) - counts_Pe.flatten()).view_as(counts_Pe)
        return segments(starts.T, counts_Pe.T), counts_Pe.sum(0)


class Routes(ABC):
    """The rows of one exchange, and their places on both sides.

    Attributes:
        arrivals: of rows on this rank, and the splits and chunks of the exchange.
    """

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals

    @property
    def splits(self) -> Splits:
        """Rows from and to each rank."""
        return self.arrivals.splits

    @property
    def degree(self) -> int:
        """Chunks."""
        return self.arrivals.degree

    @abstractmethod
    def take(self, rows_ND: Tensor, chunk: int) -> Tensor:
        """The rows of a chunk (M, D), in order of sending."""

    @abstractmethod
    def put(self, chunks: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
        """The inverse: each row in its place (N, D), in `dtype`; of one with several copies, the sum."""


class RaggedRoutes(Routes):
    """As many rows as there are.

    Args:
        arrivals: of this exchange.
        starts: gives int64 (P, e), where the rows for each rank and expert begin among this rank's rows.
        in_order: this rank's rows lie as they are sent, each going to one rank.
    """

    def __init__(self, arrivals: Arrivals, starts: Callable[[], Tensor], in_order: bool) -> None:
        super().__init__(arrivals)
        self._starts, self._in_order = starts, in_order
        self._sent: dict[int, Tensor] = {}

    def take(self, rows_ND: Tensor, chunk: int) -> Tensor:  # noqa: D102 - as inherited
        if self._in_order and self.degree == 1:
            return rows_ND.contiguous()
        return rows_ND.index_select(0, beside(self._send_index(chunk), rows_ND))

    def put(self, chunks: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        if self._in_order and self.degree == 1:
            return chunks[0]
        values = chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))
        index_M = self._sent_index(values)
        if self._in_order:
            return values.new_empty(rows, values.shape[1]).index_copy_(0, index_M, values)
        count = torch.tensor([len(index_M)], device=index_M.device)
        return ops.scatter_combine(values, index_M, None, count, rows, dtype)

    def _send_index(self, chunk: int) -> Tensor:
        """int64: the rows of a chunk in order of sending."""
        if chunk not in self._sent:
            first, counts = chunk_of(torch.tensor(self.splits.sent), chunk, self.degree)
            self._sent[chunk] = segments(self._starts() + first, counts)
        return self._sent[chunk]

    def _sent_index(self, like: Tensor) -> Tensor:
        """Of all chunks."""
        parts = [self._send_index(chunk) for chunk in range(self.degree)]
        return beside(parts[0] if len(parts) == 1 else torch.cat(parts), like)


class PaddedRoutes(Routes):
    """Buffers of equal size for every expert, with zeros after the rows that there are.

    Args:
        arrivals: of exchanges of such buffers.
        form: of the buffers.
        counts: rows of each expert.
    """

    def __init__(self, arrivals: Arrivals, form: Buffers, counts: Sequence[int]) -> None:
        super().__init__(arrivals)
        self._form, self._counts_E = form, torch.tensor(counts)
        full = min(counts) == form.capacity and form.copies == form.degree == 1
        self._lie_so = full  # rows are the buffers

    def take(self, rows_ND: Tensor, chunk: int) -> Tensor:  # noqa: D102 - as inherited
        if self._lie_so:
            return rows_ND.contiguous()
        return to_buffers(rows_ND, self._counts_E, self._form, chunk)

    def put(self, chunks: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return chunks[0] if self._lie_so else from_buffers(chunks, self._counts_E, self._form)


def beside(tensor: Tensor, rows: Tensor) -> Tensor:
    """The tensor, made on the host, on the device of the rows."""
    return tensor if rows.is_cpu else tensor.to(rows.device)
