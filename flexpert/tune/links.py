"""Measuring the links of the ranks that run now: inside their nodes, and between them.

Letters: W ranks, N nodes, L ranks of each.
"""

from __future__ import annotations

import math
from typing import Any

from flexpert.core.errors import ConfigError
from flexpert.parallel.mesh import ExpertMesh

from . import probes
from .least_squares import nonnegative
from .machine import Link
from .probes import Stopwatch

SMALL, MEDIUM = 256, 64 * 1024  # bytes of a message that costs its latency alone, and of a rank's exchange
SECONDS = 0.25  # that the large exchange may take


class Links:
    """The links of the ranks, from exchanges inside nodes, between them, and among all.

    Args:
        mesh: of all ranks.
        watch: times their calls.
        contention: how many times as long one rank's work takes where all work at once.

    Raises:
        ConfigError: nodes have unequal numbers of ranks.
    """

    def __init__(self, mesh: ExpertMesh, watch: Stopwatch, contention: float) -> None:
        if mesh.why_not_2dh:
            raise ConfigError(f"calibrate: {mesh.why_not_2dh}; start equally many ranks on each node")
        hierarchical: Any = mesh.algorithms["2dh"]
        self.mesh, self.watch, self.contention = mesh, watch, contention
        self.inside, self.between = hierarchical.inside, hierarchical.between
        self.local, self.nodes = self.inside.size, self.between.size

    def measure(self) -> dict[str, Any]:
        """Both links, and what belongs to none."""
        latency = self._latency()
        collective, messages = self._messages(latency)
        fixed = {
            "inside": latency["inside"]
            + self.contention * (collective + messages["inside"] * (self.local - 1)),
            "between": latency["between"]
            + self.contention
            * (
                collective
                + messages["inside"] * (self.local - 1)
                + messages["between"] * self.local * (self.nodes - 1)
            ),
        }
        links: dict[str, Link] = {}
        found: dict[str, Any] = {"collective": collective}
        ratio = 1.0
        for name, group, local in (("inside", self.inside, 1), ("between", self.mesh.whole, self.local)):
            if getattr(self, name).size == 1:
                continue
            others = (group.size - local) / group.size  # of what a rank sends goes over this link
            bandwidth, several, size = self._bandwidth(group, fixed[name], others * local)
            step, ring, ratio = self._ring(group, size)
            links[name] = Link(
                latency=latency[name],
                bandwidth=bandwidth,
                per_message=messages[name],
                step=step,
                ring_bandwidth=ring,
                concurrency=max(1.0, several / bandwidth),
            )
        only = next(iter(links.values()))
        return found | {
            "inside": links.get("inside", only),
            "between": links.get("between", only),
            "reduce_scatter": ratio,
        }

    def _latency(self) -> dict[str, float]:
        """One way, of two ranks of each group."""
        found = {"inside": 0.0, "between": 0.0}
        for name in found:
            group = getattr(self, name)
            if group.size == 1:
                continue
            found[name] = self.watch.together([probes.ping(group)])[0] / 2
        return found

    def _messages(self, latency: dict[str, float]) -> tuple[float, dict[str, float]]:
        """(seconds of a collective, of each message by link) of a rank alone, from tiny exchanges."""
        equations, values = [], []
        groups = [
            (self.inside, self.local - 1, 0),
            (self.between, 0, self.nodes - 1),
            (self.mesh.whole, self.local - 1, self.local * (self.nodes - 1)),
        ]
        groups = [group for group in groups if group[0].size > 1]
        calls = [probes.exchange(group, SMALL) for group, _, _ in groups]
        times = self.watch.together(calls, 3 * self.watch.repeats)
        for (_, inside, between), seconds in zip(groups, times, strict=True):
            equations.append([1.0, float(inside), float(between)])
            values.append(max(0.0, seconds - latency["between" if between else "inside"]) / self.contention)
        collective, near, far = nonnegative(equations, values)
        return collective, {"inside": near, "between": far}

    def _bandwidth(self, group: Any, fixed: float, share: float) -> tuple[float, float, int]:
        """(bytes per second of one exchange, of four at once, bytes that a rank sent)."""
        size = MEDIUM
        while True:
            seconds = self.watch.together([probes.exchange(group, size)], 1)[0]
            if seconds > SECONDS / 2 or size >= 2**22:
                break
            size = min(2**22, size * max(2, int(SECONDS / max(seconds, 1e-6) / 1.5)))
        one, four = self.watch.together(
            [probes.exchange(group, size), probes.exchange(group, size // 4, 4)], 3
        )
        wire = [math.sqrt(max(t * t - (n * fixed) ** 2, (t / 2) ** 2)) for t, n in ((one, 1), (four, 1))]
        return share * size / wire[0], share * size / wire[1], size

    def _ring(self, group: Any, size: int) -> tuple[float, float, float]:
        """(seconds of a step, bytes per second, time of a reduce-scatter over that of an all-gather)."""
        part = max(1024, size // group.size)
        tiny, gathered, scattered = self.watch.together(
            [probes.gather(group, 64), probes.gather(group, part), probes.reduce_scatter(group, part)], 3
        )
        steps = group.size - 1
        moved = steps * part / max(gathered - tiny, gathered / 2)
        return tiny / steps, moved, max(1.0, scattered / gathered)
