from __future__ import annotations

from unittest.mock import Mock, call

import pytest

from flexpert.core.errors import ConfigError
from flexpert.emulate.actions import parse_action
from flexpert.emulate.spec import ClusterSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cut 2", call.cut(2)),
        ("heal 0", call.heal(0)),
        ("rate 1 50mbit", call.set_rate(1, "50mbit")),
        ("latency 3 5ms", call.set_latency(3, "5ms")),
        ("kill 7", call.kill(7)),
        ("stop 7", call.stop(7)),
        ("  resume   7 ", call.resume(7)),
    ],
)
def test_an_action_is_one_call(text: str, expected: object) -> None:
    cluster = Mock()
    parse_action(text)(cluster)
    assert cluster.mock_calls == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "action '' is unknown; possible are: cut NODE, heal NODE, rate NODE RATE"),
        ("pause 1", "'pause 1' is unknown"),
        ("cut", "'cut' is unknown"),
        ("cut x", "'cut x'"),
        ("cut -1", "'cut -1'"),
        ("cut 1 2", "'cut 1 2'"),
        ("rate 1", "'rate 1'"),
        ("rate 1 fast", "rate='fast'"),
        ("latency 1 50mbit", "latency='50mbit'"),
    ],
)
def test_anything_else_is_refused_before(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_action(text)


def test_nodes_and_ranks_that_a_cluster_has_not_are_refused_before() -> None:
    spec = ClusterSpec.parse(2, 3)
    parse_action("cut 1", spec)
    parse_action("kill 5", spec)
    with pytest.raises(ConfigError, match="'cut 2': the cluster has the nodes 0 to 1"):
        parse_action("cut 2", spec)
    with pytest.raises(ConfigError, match="'kill 6': the cluster has the ranks 0 to 5"):
        parse_action("kill 6", spec)
