"""What may be done to a running cluster, in words: `cut 2`, `rate 1 50mbit`, `kill 3`."""

from __future__ import annotations

from collections.abc import Callable

from flexpert.core.errors import ConfigError

from .cluster import Cluster
from .spec import ClusterSpec
from .units import parse_rate, parse_time

ACTIONS: dict[str, tuple[str, Callable[[Cluster, int, str], None]]] = {
    "cut": ("NODE", lambda cluster, number, _: cluster.cut(number)),
    "heal": ("NODE", lambda cluster, number, _: cluster.heal(number)),
    "rate": ("NODE RATE", lambda cluster, number, text: cluster.set_rate(number, text)),
    "latency": ("NODE TIME", lambda cluster, number, text: cluster.set_latency(number, text)),
    "kill": ("RANK", lambda cluster, number, _: cluster.kill(number)),
    "stop": ("RANK", lambda cluster, number, _: cluster.stop(number)),
    "resume": ("RANK", lambda cluster, number, _: cluster.resume(number)),
}


def usage() -> str:
    """All actions with their arguments."""
    return ", ".join(f"{name} {arguments}" for name, (arguments, _) in ACTIONS.items())


def parse_action(text: str, spec: ClusterSpec | None = None) -> Callable[[Cluster], None]:
    """The action that a line asks for, of the nodes and ranks of a cluster where that is given.

    Raises:
        ConfigError: there is no such action, its arguments are others, or no such node or rank.
    """
    name, *arguments = text.split() or [""]
    wanted, act = ACTIONS.get(name, ("", None))
    if act is None or len(arguments) != len(wanted.split()) or not arguments[0].isdecimal():
        raise ConfigError(f"action {text!r} is unknown; possible are: {usage()}")
    if spec is not None:
        kind = wanted.split()[0].lower()
        last = (spec.nodes if kind == "node" else spec.world_size) - 1
        if int(arguments[0]) > last:
            raise ConfigError(f"action {text!r}: the cluster has the {kind}s 0 to {last}")
    if name == "rate":
        parse_rate(arguments[1], name)
    if name == "latency":
        parse_time(arguments[1], name)
    return lambda cluster: act(cluster, int(arguments[0]), arguments[-1])
