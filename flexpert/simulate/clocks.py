"""The clocks of all ranks, moved on by what they compute, send and wait for.

Each rank has a clock for what it computes, one for what it exchanges with the ranks it shares experts with,
and one for the dense gradients and parameters, which travel beside both. All ranks move at once, as tensors
(W,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flexpert.parallel.timeline import Event, Kind, Timeline

from .cluster import Cluster

WAIT = "wait"  # for other ranks
Path = dict[str, Tensor]  # seconds by phase, of each rank


class Stage(NamedTuple):
    """A part of an exchange: seconds of each rank, and the ranks that must all be there for it to end."""

    seconds_W: Tensor
    group_W: Tensor


@dataclass(frozen=True)
class Arrival:
    """When an exchange is complete, how much of that a rank's own transfer takes, and what it waited for."""

    name: str
    end_W: Tensor
    own_W: Tensor
    path: Path


@dataclass
class Clocks:
    """Seconds since the step began, for each rank.

    Attributes:
        cluster: the ranks.
        watch: ranks whose events are kept for a timeline.
        now_W: what each has computed and waited up to.
        parts_W: seconds of each rank by phase; they add up to `now_W`.
        path: the critical path to `now_W`: the same seconds by what some rank did in them, without waiting.
    """

    cluster: Cluster
    watch: Sequence[int] = ()
    parts_W: Path = field(default_factory=dict)
    path: Path = field(default_factory=dict)
    timelines: dict[int, Timeline] = field(default_factory=dict)
    num_events: int = 0

    def __post_init__(self) -> None:
        zeros = torch.zeros(self.cluster.ranks, dtype=torch.float64)
        self.now_W, self._links = zeros, {"link": zeros, "side": zeros}
        self._link_paths: dict[str, Path] = {"link": {}, "side": {}}
        self.timelines = {rank: Timeline() for rank in self.watch}

    def compute(
        self, name: str, seconds: Tensor | float, *, chunk: int | None = None, interference: float = 1.0
    ) -> None:
        """Compute for so long at a rank's usual speed; `interference` times as long while rows travel."""
        seconds_W = torch.as_tensor(seconds, dtype=torch.float64) / self.cluster.compute_W
        if interference != 1.0:
            seconds_W = torch.where(self._links["link"] > self.now_W, interference * seconds_W, seconds_W)
        seconds_W = seconds_W.expand_as(self.now_W)
        self.parts_W = _plus(self.parts_W, name, seconds_W)
        self.path = _plus(self.path, name, seconds_W)
        self._record(name, "compute", self.now_W, self.now_W + seconds_W, chunk)
        self.now_W = self.now_W + seconds_W

    def send(
        self, name: str, stages: Sequence[Stage], *, chunk: int | None = None, link: str = "link"
    ) -> Arrival:
        """Put an exchange on its way: it begins when the rank is there and its link is free.

        A stage is complete on no rank before every rank of its group has sent its part.
        """
        begin_W = torch.maximum(self.now_W, self._links[link])
        end_W, own_W = begin_W, torch.zeros_like(begin_W)
        path = _choose(self._links[link] > self.now_W, self._link_paths[link], self.path)
        for stage in stages:
            own_W = own_W + stage.seconds_W
            end_W, last_W = latest(end_W + stage.seconds_W, stage.group_W)
            path = _plus(path, name, stage.seconds_W)
            path = {phase: value_W[last_W] for phase, value_W in path.items()}
        self._links[link], self._link_paths[link] = end_W, path
        self._record(name, "communication", begin_W, end_W, chunk)
        return Arrival(name, end_W, own_W, path)

    def wait(self, arrival: Arrival) -> None:
        """Wait until an exchange is complete: for the own transfer first, the rest is other ranks' doing."""
        gap_W = (arrival.end_W - self.now_W).clamp(min=0)
        own_W = torch.minimum(gap_W, arrival.own_W)
        self.parts_W = _plus(_plus(self.parts_W, arrival.name, own_W), WAIT, gap_W - own_W)
        self.path = _choose(gap_W > 0, arrival.path, self.path)
        self.now_W = self.now_W + gap_W

    def repeat(self, times: int) -> None:
        """Let what has passed so far happen `times` times in all."""
        self.parts_W = {name: times * value_W for name, value_W in self.parts_W.items()}
        for link in self._links:
            for name, value_W in self.path.items():
                self._link_paths[link] = _plus(self._link_paths[link], name, (times - 1) * value_W)
        self.path = {name: times * value_W for name, value_W in self.path.items()}
        self._links = {name: value_W + (times - 1) * self.now_W for name, value_W in self._links.items()}
        self.now_W = times * self.now_W

    def finish(self) -> float:
        """Wait for all ranks; seconds of the step."""
        end, last = float(self.now_W.max()), int(self.now_W.argmax())
        self.parts_W = _plus(self.parts_W, WAIT, end - self.now_W)
        self.path = {name: value_W[last].expand_as(value_W) for name, value_W in self.path.items()}
        self.now_W = torch.full_like(self.now_W, end)
        return end

    def _record(self, name: str, kind: Kind, begin_W: Tensor, end_W: Tensor, chunk: int | None) -> None:
        self.num_events += 1
        for rank, timeline in self.timelines.items():
            begin, end = float(begin_W[rank]), float(end_W.expand_as(begin_W)[rank])
            if end > begin:
                timeline.events.append(Event(name, kind, begin, end, chunk))


def latest(value_W: Tensor, group_W: Tensor) -> tuple[Tensor, Tensor]:
    """(W,) each: the largest value in each rank's group, and the first rank that has it."""
    groups = int(group_W.max()) + 1
    most_W = value_W.new_zeros(groups).scatter_reduce(0, group_W, value_W, "amax", include_self=False)[
        group_W
    ]
    rank_W = torch.arange(len(value_W))
    first_W = torch.where(value_W == most_W, rank_W, len(value_W))
    last = torch.zeros(groups, dtype=torch.int64)
    last = last.scatter_reduce(0, group_W, first_W, "amin", include_self=False)
    return most_W, last[group_W]


def _plus(path: Path, name: str, seconds_W: Tensor) -> Path:
    return {**path, name: path[name] + seconds_W if name in path else seconds_W}


def _choose(first_W: Tensor, one: Path, other: Path) -> Path:
    """Each rank's path: one where `first_W`, else the other."""
    if one is other or not bool(first_W.any()):
        return other
    zero = torch.zeros(len(first_W), dtype=torch.float64)
    names = dict.fromkeys([*other, *one])
    return {name: torch.where(first_W, one.get(name, zero), other.get(name, zero)) for name in names}
