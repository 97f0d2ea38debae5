from __future__ import annotations

from typing import Any

import pytest

from flexpert.core.errors import ConfigError
from flexpert.emulate.spec import ClusterSpec


def test_slow_nodes_have_links_of_their_own() -> None:
    spec = ClusterSpec.parse(3, 2, "200mbit", "500us", {1: "50mbit", 2: "10mbit,5ms"})
    assert spec.rates == (200_000_000, 50_000_000, 10_000_000)
    assert spec.latencies == (500_000, 500_000, 5_000_000)
    assert spec.world_size == 6
    assert spec.describe() == ("3 x 2 ranks, links of 200mbit 500us, node 1 50mbit 500us, node 2 10mbit 5ms")


def test_what_is_asked() -> None:
    assert not ClusterSpec.parse(2, 1).limits_rate
    assert not ClusterSpec.parse(2, 1, latency="0us").has_latency
    assert ClusterSpec.parse(2, 1, slow_nodes={1: "1mbit"}).limits_rate
    assert ClusterSpec.parse(2, 1, "1mbit", slow_nodes={1: "1mbit,1ms"}).has_latency


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 0}, "nodes=0 is out of range"),
        ({"nodes": 251}, "from 1 to 250"),
        ({"ranks": 0}, "ranks=0"),
        ({"nodes": 4, "ranks": 257}, "from 1 to 256"),
        ({"bandwidth": "fast"}, "bandwidth='fast'"),
        ({"latency": "5"}, "latency='5'"),
        ({"slow_nodes": {2: "1mbit"}}, "node 2 is none of the nodes 0 to 1"),
        ({"slow_nodes": {1: "1mbit,"}}, r"slow_nodes\[1\]=''"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClusterSpec.parse(**{"nodes": 2, "ranks": 1, **arguments})
