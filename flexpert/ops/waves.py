"""Consecutive experts in waves: all but the matrix products is done once per wave, not once per expert.

A wave has enough rows to make the cost of an operator call small, and few enough to stay near the cores. Its
rows keep their order, without gaps. In half precision each product computes a padded number of rows (see
`products`): the spare ones are the first rows of the experts that follow, or rows after the wave. Hence
- products that write rows take the parts in order, so that every row is written last by its own expert;
- products that sum over rows take them backwards, zeroing the spare rows of each part: their own experts are
  done by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .products import ROW_TILE, padded, segments

WAVE_ROWS = 1024


class Part(NamedTuple):
    """One expert of a wave, in rows counted from the wave's first."""

    slot: int
    own: slice
    spare: slice  # computed after its own, for the product's sake
    rows: slice  # both


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Rows `start` to `stop`; buffers hold `size` rows from `start`, which no part exceeds."""

    start: int
    stop: int
    size: int
    parts: tuple[Part, ...]

    def slots(self, device: torch.device) -> Tensor:
        """int64: the slot of each part."""
        return torch.tensor([part.slot for part in self.parts], device=device)

    def edges(self, device: torch.device) -> Tensor:
        """int64: where parts begin, and the number of rows."""
        edges = [part.own.start for part in self.parts]
        return torch.tensor([*edges, self.stop - self.start], device=device)


def _wave(members: list[tuple[int, int, int]], dtype: torch.dtype) -> Wave:
    first = members[0][1]
    parts = []
    for slot, start, stop in members:
        begin, end = start - first, stop - first
        spared = begin + padded(stop - start, dtype)
        parts.append(Part(slot, slice(begin, end), slice(end, spared), slice(begin, spared)))
    size = max(part.rows.stop for part in parts)
    if len(parts) > 1 and dtype.itemsize == 2:  # oneDNN's activations, too, are built for every new shape
        size = -(-size // ROW_TILE) * ROW_TILE
    return Wave(start=first, stop=members[-1][2], size=size, parts=tuple(parts))


def waves(counts_E: Tensor, slot_E: Tensor | None, dtype: torch.dtype) -> Iterator[Wave]:
    """All experts that have rows and a slot, in order. One of WAVE_ROWS or more is a wave of its own.

    Reads the counts on the host.
    """
    members: list[tuple[int, int, int]] = []
    for slot, start, stop in segments(counts_E, slot_E):
        if members:
            first, last = members[0][1], members[-1][2]
            if start != last or last - first >= WAVE_ROWS or stop - start >= WAVE_ROWS:
                yield _wave(members, dtype)
                members = []
        members.append((slot, start, stop))
    if members:
        yield _wave(members, dtype)


def room(plan: Iterable[Wave]) -> int:
    """Rows of a buffer that holds any wave."""
    return max((wave.size for wave in plan), default=0)
