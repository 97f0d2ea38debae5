"""What a cluster looks like: nodes, ranks, and the link of each node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexpert.core.errors import ConfigError

from .units import format_rate, format_time, parse_rate, parse_time

MAX_NODES = 250
MAX_RANKS = 1024


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Nodes, ranks of each, and the link by which each node hangs on one switch.

    Attributes:
        nodes: number of nodes.
        ranks: ranks of each node.
        rates: bits per second of each node's link, in each direction; None: no limit.
        latencies: nanoseconds of each node; a message from a to b takes (latencies[a] + latencies[b]) / 2
            besides its transmission, which is the latency where all have the same.
    """

    nodes: int
    ranks: int
    rates: tuple[int | None, ...]
    latencies: tuple[int, ...]

    @classmethod
    def parse(
        cls,
        nodes: int,
        ranks: int,
        bandwidth: str | None = None,
        latency: str | None = None,
        slow_nodes: Mapping[int, str] | None = None,
    ) -> ClusterSpec:
        """The cluster of these texts; `slow_nodes` has "RATE" or "RATE,LATENCY" of nodes unlike the others.

        Raises:
            ConfigError: a number out of range, or a text that is no rate or time.
        """
        _check_range("nodes", nodes, MAX_NODES)
        _check_range("ranks", ranks, MAX_RANKS // nodes)
        rates = [None if bandwidth is None else parse_rate(bandwidth)] * nodes
        latencies = [0 if latency is None else parse_time(latency)] * nodes
        for node, text in (slow_nodes or {}).items():
            if not 0 <= node < nodes:
                raise ConfigError(f"slow_nodes: node {node} is none of the nodes 0 to {nodes - 1}")
            name = f"slow_nodes[{node}]"
            rate, comma, time = text.partition(",")
            rates[node] = parse_rate(rate, name)
            if comma:
                latencies[node] = parse_time(time, name)
        return cls(nodes=nodes, ranks=ranks, rates=tuple(rates), latencies=tuple(latencies))

    @property
    def world_size(self) -> int:
        """The number of ranks of all nodes."""
        return self.nodes * self.ranks

    @property
    def limits_rate(self) -> bool:
        """Whether any link has a rate."""
        return any(rate is not None for rate in self.rates)

    @property
    def has_latency(self) -> bool:
        """Whether any link has a latency."""
        return any(self.latencies)

    def describe(self) -> str:
        """Nodes, ranks and links in a line."""
        links = [
            f"{format_rate(r)} {format_time(t)}" for r, t in zip(self.rates, self.latencies, strict=True)
        ]
        usual = max(set(links), key=lambda link: (links.count(link), -links.index(link)))
        others = [f"node {k} {link}" for k, link in enumerate(links) if link != usual]
        return f"{self.nodes} x {self.ranks} ranks, links of {', '.join([usual, *others])}"


def _check_range(name: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise ConfigError(f"{name}={value} is out of range: from 1 to {largest} are possible here")
