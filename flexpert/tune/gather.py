"""What all ranks must know to decide alike: the sum of each rank's counts and times, gathered on the way.

One asynchronous sum of integers, so that it is exact and equal on every rank. It starts when the last call of
a step has its counts (as far as the step before tells which one that is) and is read when the step ends: the
whole backward lies between. Each rank sends its numbers to every other: that is one message each way, where
gloo's all-reduce goes around its ring twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.parallel.group import Group
from flexpert.parallel.pending import Pending

_NANO = 1_000_000_000


@dataclass(frozen=True)
class Seen:
    """Calls of one layer in a step, on all ranks.

    Attributes:
        counts: rows for each expert in one call, the sum over the ranks.
        capacity: rows of one expert's buffer, the mean over ranks; None without.
        tokens: of a rank, the mean.
    """

    counts: tuple[int, ...]
    capacity: int | None
    tokens: int


@dataclass(frozen=True)
class News:
    """What a sum brought: the layers that were called, and the mean over ranks of a step's seconds."""

    layers: dict[str, Seen]
    seconds: float | None


class Gatherer:
    """Sums over the ranks what each of them sees.

    Args:
        group: of the ranks, for these sums alone.
        experts: of each layer; the same layers in the same order on all ranks.
    """

    def __init__(self, group: Group, experts: Mapping[str, int]) -> None:
        self._group = group
        self._place: dict[str, tuple[int, int]] = {}
        end = 2
        for name, count in experts.items():
            self._place[name] = end, end + 3 + count
            end += 3 + count
        self._own = torch.zeros(end, dtype=torch.int64)
        self._pending: tuple[Pending, Tensor] | None = None
        self._calls, self._expected = 0, 0
        self._active = True

    def begin(self, active: bool = True) -> None:
        """Begin a step; unless it is active, nothing is noted in it and no rank sends anything."""
        self._own.zero_()
        self._calls = 0
        self._active = active

    def add(
        self, name: str, counts: Sequence[int], capacity: int | None, tokens: int, seconds: float | None
    ) -> None:
        """Note a call; with the step's last one the sum sets off, with `seconds` of the step before."""
        if not self._active:
            return
        first, end = self._place[name]
        row = [1, -1 if capacity is None else capacity, tokens, *counts]
        self._own[first:end] += torch.tensor(row)
        self._calls += 1
        if self._calls == self._expected:
            self._start(seconds)

    def end(self, seconds: float | None) -> News | None:
        """End a step: what its sum brought; None for a step that is not active, or without calls.

        Only a step with another number of calls than the one before waits for its sum here.

        Raises:
            DistributedError: a rank is gone.
        """
        if not self._active:
            return None
        if self._pending is None and self._calls:
            self._start(seconds)
        self._expected = self._calls
        return self._read()

    def _start(self, seconds: float | None) -> None:
        self._own[0], self._own[1] = (0, 0) if seconds is None else (round(seconds * _NANO), 1)
        sent = self._own.repeat(self._group.size)
        arrived = torch.empty_like(sent)
        self._pending = self._group.all_to_all(arrived, sent, async_op=True), arrived

    def _read(self) -> News | None:
        if self._pending is None:
            return None
        pending, arrived = self._pending
        pending.wait()
        self._pending = None
        ranks = self._group.size
        values = arrived.view(ranks, -1).sum(0).tolist()
        layers = {}
        for name, (first, end) in self._place.items():
            calls, capacity, tokens, *counts = values[first:end]
            if calls:
                layers[name] = Seen(
                    counts=tuple(ranks * count // calls for count in counts),
                    capacity=None if capacity < 0 else capacity // calls,
                    tokens=tokens // calls,
                )
        nano, known = values[:2]
        return News(layers, nano / ranks / _NANO if known == ranks else None)
