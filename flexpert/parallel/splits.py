"""How many rows each rank sends each other, known on the host; and the chunks that a pipeline makes of them.

Every (source, destination, class) has one segment of rows. Chunk i of d takes rows floor(n i / d) to
floor(n (i + 1) / d) of each segment of n rows, so each chunk has its share for every destination.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexpert.core.errors import InputError

from .parts import Parts

Counts = list[list[int]]
Rows = TypeVar("Rows", int, Tensor)


@dataclass(frozen=True)
class Splits:
    """The rows of one exchange.

    Attributes:
        sent: rows to each destination, by class: (P, C).
        received: rows from each source, by class: (P, C).
    """

    sent: Counts
    received: Counts

    def chunk(self, chunk: int, degree: int) -> Any:
        """The rows of one chunk, of `degree`; worked out once, for calls that exchange the same."""
        if degree == 1 and chunk == 0:
            return self
        if (chunk, degree) not in self._chunks:
            self._chunks[chunk, degree] = self._cut(chunk, degree)
        return self._chunks[chunk, degree]

    @cached_property
    def forward(self) -> Parts:
        """Rows to and from each rank, all classes together."""
        return Parts(row_totals(self.sent), row_totals(self.received))

    @cached_property
    def reverse(self) -> Parts:
        """Those of the way back."""
        return Parts(self.forward.receive, self.forward.send)

    @cached_property
    def _chunks(self) -> dict[tuple[int, int], Splits]:
        return {}

    def _cut(self, chunk: int, degree: int) -> Splits:
        return Splits(chunk_counts(self.sent, chunk, degree), chunk_counts(self.received, chunk, degree))

    def of_classes(self, number: int) -> Splits:
        """Those of the first classes alone; the others must be empty."""
        return Splits([row[:number] for row in self.sent], [row[:number] for row in self.received])


def chunk_of(counts: Rows, chunk: int, degree: int) -> tuple[Rows, Rows]:
    """(first, count) of the rows of chunk `chunk` of `degree` in segments of `counts` rows."""
    first = counts * chunk // degree
    return first, counts * (chunk + 1) // degree - first


def chunk_counts(counts: Sequence[Sequence[int]], chunk: int, degree: int) -> Counts:
    """Rows of chunk `chunk` of `degree` for each segment of `counts`.

    Raises:
        InputError: there is no such chunk.
    """
    if not 0 <= chunk < degree:
        raise InputError(f"chunk={chunk} of degree={degree}; chunks are 0 to degree - 1")
    if degree == 1:
        return [list(row) for row in counts]
    return [[chunk_of(n, chunk, degree)[1] for n in row] for row in counts]


def segments(starts: Tensor, lengths: Tensor) -> Tensor:
    """int64: starts[0] .. starts[0] + lengths[0] - 1, then those of the next segment, and so on."""
    starts, lengths = starts.reshape(-1), lengths.reshape(-1)
    before = lengths.cumsum(0) - lengths
    index = torch.repeat_interleave(starts - before, lengths)
    return index + torch.arange(index.shape[0])


def row_totals(counts: Sequence[Sequence[int]]) -> list[int]:
    """Rows of each rank, all classes together."""
    return [sum(row) for row in counts]
