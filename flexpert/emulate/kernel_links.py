"""Links shaped by the kernel: a pair of devices per node on a bridge, with queues of `tc` at both ends."""

from __future__ import annotations

from flexpert.core.errors import ConfigError

from .namespaces import Namespace
from .network import DEVICE, MTU, NamespaceNetwork
from .spec import ClusterSpec

QUEUE_BYTES = 64 * 2**20  # a link without loss: no collective has more under way
QUEUE_FRAMES = 100_000


class KernelLinks(NamespaceNetwork):
    """Mode "shape": netem delays and limits. Mode "bandwidth": tbf limits, latency is what the kernel needs.

    The queue of a node's own device is its uplink, that of the bridge's port its downlink.
    """

    def __init__(self, spec: ClusterSpec, spaces: list[Namespace], *, delay: bool) -> None:
        super().__init__(spec, spaces)
        self.mode = "shape" if delay else "bandwidth"
        self._delay = delay
        self._rates, self._latencies = list(spec.rates), list(spec.latencies)
        self._connect()
        self.configure_nodes()
        for node in range(spec.nodes):
            self._shape(node)

    @property
    def _bridge(self) -> Namespace:
        return self.spaces[self.spec.nodes]

    def cut(self, node: int) -> None:
        """Its port leaves the bridge, without what waits there; the node's device keeps its carrier."""
        self._bridge.run(["ip", "link", "set", f"p{node}", "nomaster"])
        self._remove_queue(self._bridge, f"p{node}")

    def heal(self, node: int) -> None:
        """The port comes back."""
        self._shape(node)
        self._bridge.run(["ip", "link", "set", f"p{node}", "master", "br0"])

    def set_rate(self, node: int, rate: int | None) -> None:
        """Both directions."""
        self._rates[node] = rate
        self._shape(node)

    def set_latency(self, node: int, latency: int) -> None:
        """Half of it on each way.

        Raises:
            ConfigError: mode "bandwidth" has none.
        """
        if not self._delay:
            raise ConfigError("set_latency: mode='bandwidth' has no latency; the modes shape and switch have")
        self._latencies[node] = latency
        self._shape(node)

    def _connect(self) -> None:
        lines = ["link add br0 type bridge", f"link set br0 up mtu {MTU}"]
        for node, space in enumerate(self.nodes):
            lines += [
                f"link add p{node} mtu {MTU} type veth peer name {DEVICE} netns /proc/self/fd/{space.net}",
                f"link set p{node} master br0 up addrgenmode none",
            ]
        self._bridge.run(["ip", "-batch", "-"], "\n".join(lines) + "\n", [s.net for s in self.nodes])

    def _shape(self, node: int) -> None:
        queue = self._queue(self._rates[node], self._latencies[node])
        for space, device in ((self.nodes[node], DEVICE), (self._bridge, f"p{node}")):
            if queue:
                space.run(["tc", "qdisc", "replace", "dev", device, "root", *queue])
            else:
                self._remove_queue(space, device)

    @staticmethod
    def _remove_queue(space: Namespace, device: str) -> None:
        if "noqueue" not in space.run(["tc", "qdisc", "show", "dev", device]):
            space.run(["tc", "qdisc", "del", "dev", device, "root"])

    def _queue(self, rate: int | None, latency: int) -> list[str]:
        limit = [] if rate is None else ["rate", f"{rate}bit"]
        if self._delay:
            # A message passes its sender's and its receiver's queue: half of that node's latency in each.
            delay = ["delay", f"{latency / 2000:.3f}us"] if latency else []
            return ["netem", "limit", str(QUEUE_FRAMES), *delay, *limit] if delay or limit else []
        if not limit:
            return []
        # The kernel hands over up to 64 KiB as one; a smaller bucket would cut these up, for processor time.
        return ["tbf", *limit, "burst", "128k", "limit", str(QUEUE_BYTES)]
