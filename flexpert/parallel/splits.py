"""How many rows each rank sends each other, known on the host; and the chunks that a pipeline makes of them.

Every (source, destination, class) has one segment of rows. Chunk i of d takes rows floor(n i / d) to
floor(n (i + 1) / d) of each segment of n rows, so each chunk has its share for every destination.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.core.errors import InputError

Counts = list[list[int]]


@dataclass(frozen=True)
class Splits:
    """The rows of one exchange.

    Attributes:
        sent: rows to each destination, by class: (P, C).
        received: rows from each source, by class: (P, C).
    """

    sent: Counts
    received: Counts

    def chunk(self, chunk: int, degree: int) -> Splits:
        """The rows of one chunk, of `degree`."""
        return Splits(chunk_counts(self.sent, chunk, degree), chunk_counts(self.received, chunk, degree))

    def of_classes(self, number: int) -> Splits:
        """Those of the first classes alone; the others must be empty."""
        return Splits([row[:number] for row in self.sent], [row[:number] for row in self.received])

    def sent_rows(self, chunk: int, degree: int) -> Tensor:
        """int64: which of the rows in order of (destination, class) are the chunk's, in its order."""
        return chunk_rows(self.sent, chunk, degree)

    def received_rows(self, chunk: int, degree: int) -> Tensor:
        """int64: which of the rows in order of (source, class) are the chunk's, in its order."""
        return chunk_rows(self.received, chunk, degree)


def chunk_counts(counts: Sequence[Sequence[int]], chunk: int, degree: int) -> Counts:
    """Rows of chunk `chunk` of `degree` for each segment of `counts`.

    Raises:
        InputError: there is no such chunk.
    """
    if not 0 <= chunk < degree:
        raise InputError(f"chunk={chunk} of degree={degree}; chunks are 0 to degree - 1")
    if degree == 1:
        return [list(row) for row in counts]
    return [[n * (chunk + 1) // degree - n * chunk // degree for n in row] for row in counts]


def chunk_rows(counts: Sequence[Sequence[int]], chunk: int, degree: int) -> Tensor:
    """int64: the positions of a chunk's rows among all rows, segment after segment.

    Raises:
        InputError: there is no such chunk.
    """
    sizes = torch.tensor(chunk_counts(counts, chunk, degree), dtype=torch.int64).flatten()
    whole = torch.tensor(counts, dtype=torch.int64).flatten()
    first = whole.cumsum(0) - whole + whole * chunk // degree
    shift = first - (sizes.cumsum(0) - sizes)
    return torch.arange(int(sizes.sum())) + shift.repeat_interleave(sizes)


def row_totals(counts: Sequence[Sequence[int]]) -> list[int]:
    """Rows of each rank, all classes together."""
    return [sum(row) for row in counts]
