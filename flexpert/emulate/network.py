"""The network of a cluster: what all modes offer, and the mode without any."""

from __future__ import annotations

import ipaddress
import socket
from abc import ABC, abstractmethod

from flexpert.core.errors import ConfigError

from . import namespaces
from .namespaces import Namespace
from .spec import ClusterSpec

MTU = 9000
DEVICE = "eth0"
QUEUE_FRAMES = 10_000  # of a device: none is lost while whoever empties it waits for a core


class Network(ABC):
    """Nodes and the links between them.

    Attributes:
        mode: its name.
        spec: the cluster that it is the network of.
        device: the interface ranks talk through.
    """

    mode: str
    device = DEVICE

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec

    @abstractmethod
    def address(self, node: int) -> str:
        """The IPv4 address of a node."""

    @abstractmethod
    def enter(self, node: int) -> None:
        """Move the calling process, which has one thread, to a node."""

    @abstractmethod
    def free_port(self) -> int:
        """A TCP port of node 0 that nothing listens on."""

    @abstractmethod
    def cut(self, node: int) -> None:
        """Drop all frames from and to a node, without a sign to either side."""

    @abstractmethod
    def heal(self, node: int) -> None:
        """Undo `cut`."""

    @abstractmethod
    def set_rate(self, node: int, rate: int | None) -> None:
        """Change the rate of a node's link, in bits per second, None: no limit."""

    @abstractmethod
    def set_latency(self, node: int, latency: int) -> None:
        """Change the latency of a node's link, in nanoseconds."""

    @abstractmethod
    def kill_processes(self) -> None:
        """End every process that is still on a node."""

    @abstractmethod
    def close(self) -> None:
        """Remove the network. No process may be left on it."""

    @abstractmethod
    def forget(self) -> None:
        """In a forked rank: close what keeps the network alive."""


class LoopbackNetwork(Network):
    """All nodes on the machine's loopback: no shaping, no isolation, no rights needed."""

    mode = "loopback"
    device = "lo"

    def address(self, node: int) -> str:
        """127.0.0.1."""
        return "127.0.0.1"

    def enter(self, node: int) -> None:
        """Nothing to enter."""

    def free_port(self) -> int:
        """A port that was free a moment ago."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def cut(self, node: int) -> None:
        """Refused."""
        raise self._refusal("cut")

    def heal(self, node: int) -> None:
        """Refused."""
        raise self._refusal("heal")

    def set_rate(self, node: int, rate: int | None) -> None:
        """Refused."""
        raise self._refusal("set_rate")

    def set_latency(self, node: int, latency: int) -> None:
        """Refused."""
        raise self._refusal("set_latency")

    def kill_processes(self) -> None:
        """Nothing tells the processes of ranks from others: their process groups were ended, no more."""

    def close(self) -> None:
        """Nothing to remove."""

    def forget(self) -> None:
        """Nothing is kept."""

    @staticmethod
    def _refusal(action: str) -> ConfigError:
        return ConfigError(f"{action}: mode='loopback' has no links; the modes shape, switch, bandwidth have")


class NamespaceNetwork(Network):
    """One network namespace per node, 10.77.0.0/16 between them; static neighbours, no ARP, no IPv6 outside.

    Ranks of one node talk over the loopback of its namespace, at the speed of memory.
    """

    def __init__(self, spec: ClusterSpec, spaces: list[Namespace]) -> None:
        super().__init__(spec)
        self.spaces = spaces
        self._port = 29500

    @property
    def nodes(self) -> list[Namespace]:
        """The namespaces of the nodes, without those of the network's own."""
        return self.spaces[: self.spec.nodes]

    def address(self, node: int) -> str:
        """10.77.0.1 and following."""
        return str(ipaddress.IPv4Address("10.77.0.1") + node)

    def enter(self, node: int) -> None:
        """By setns."""
        self.nodes[node].enter()

    def free_port(self) -> int:
        """The next one: nobody else listens there, and earlier runs may still hold theirs for a while."""
        self._port += 1
        return self._port

    def kill_processes(self) -> None:
        """Found by their namespace."""
        for space in self.nodes:
            space.kill_processes()

    def close(self) -> None:
        """The kernel removes devices and queues with the namespaces."""
        namespaces.close(self.spaces)
        self.spaces = []

    def forget(self) -> None:
        """The descriptors of all namespaces."""
        self.close()

    def configure_nodes(self) -> None:
        """Addresses, routes and neighbours of the devices in all nodes."""
        for node, space in enumerate(self.nodes):
            neighbours = [
                f"neigh add {self.address(other)} dev {DEVICE} lladdr {_hardware_address(other)} "
                "nud permanent"
                for other in range(self.spec.nodes)
                if other != node
            ]
            lines = [
                "link set lo up",
                f"link set {DEVICE} address {_hardware_address(node)} mtu {MTU} addrgenmode none "
                f"txqueuelen {QUEUE_FRAMES}",
                f"addr add {self.address(node)}/16 dev {DEVICE}",
                f"link set {DEVICE} up",
                *neighbours,
            ]
            space.run(["ip", "-batch", "-"], "\n".join(lines) + "\n")


def _hardware_address(node: int) -> str:
    return f"02:00:00:00:{node >> 8:02x}:{node & 255:02x}"
