"""A cluster on one machine, for tests and benchmarks."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from flexpert.core.errors import ConfigError, InputError

from .build_network import build_network
from .environment import places
from .job import Echo, Job
from .network import Network
from .outcome import Outcome, RanksFailed
from .ranks import Body, command_body, function_body
from .spec import ClusterSpec
from .units import parse_rate, parse_time
from .values import encode

__all__ = ["Cluster"]

_log = logging.getLogger("flexpert")


class Cluster:
    """Nodes with ranks on them, joined by links of given bandwidth and latency; exists inside `with`.

    Args:
        nodes: number of nodes, each a network namespace where the machine allows it.
        ranks: ranks of each node.
        bandwidth: of each node's link in each direction, such as "200mbit"; None: no limit.
        latency: one way between two nodes, such as "500us"; None: what the machine needs.
        slow_nodes: nodes with another link: {2: "50mbit"} or {2: "50mbit,5ms"}.
        mode: "shape", "switch", "bandwidth", "loopback", or "auto": the cheapest that does what is asked.

    Attributes:
        spec: the numbers of the above.
        missing: what of it is not emulated, and why; "" if all is.

    Raises:
        ConfigError: an argument that cannot be (at construction), or not on this machine (when entered).
    """

    def __init__(
        self,
        nodes: int,
        ranks: int = 1,
        *,
        bandwidth: str | None = None,
        latency: str | None = None,
        slow_nodes: Mapping[int, str] | None = None,
        mode: str = "auto",
    ) -> None:
        self.spec = ClusterSpec.parse(nodes, ranks, bandwidth, latency, slow_nodes)
        self.missing = ""
        self._asked = mode
        self._network: Network | None = None
        self._job: Job | None = None

    def __enter__(self) -> Cluster:
        self._network, choice = build_network(self.spec, self._asked)
        self.missing = choice.missing
        if self.missing:
            _log.warning("not emulated: %s", self.missing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end_job()
        finally:
            network, self._network = self.network, None
            network.kill_processes()
            network.close()

    @property
    def network(self) -> Network:
        """The network under it.

        Raises:
            InputError: outside `with`.
        """
        if self._network is None:
            raise InputError("the cluster exists inside its `with` block only")
        return self._network

    @property
    def mode(self) -> str:
        """Which of the modes it has."""
        return self.network.mode

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        init: str | None = "gloo",
        collective_timeout: float = 60.0,
        timeout: float | None = 300.0,
        grace: float = 10.0,
        echo: Echo | None = None,
    ) -> list[Any]:
        """Call a function in every rank and return what it returned, by rank.

        Ranks are forked: the function may be a closure, and finds modules imported and the generators as they
        are here. They compute with one thread.

        Args:
            function: called as function(*arguments); returns None, bool, int, float, str, tensors, and lists,
                tuples and dicts of these.
            arguments: of the function.
            init: backend of `init_process_group`, called before; None: not called.
            collective_timeout: of that group, in seconds.
            timeout: seconds after which the ranks that still run are ended.
            grace: seconds that the others have after one has failed.
            echo: called with place, stream (1 or 2) and each line that a rank writes.

        Raises:
            RanksFailed: a rank raised, ended with another status than 0, or took too long.
        """
        job = self.start(function, *arguments, init=init, collective_timeout=collective_timeout, echo=echo)
        outcomes = job.wait(timeout, grace=grace)
        if not all(outcome.ok for outcome in outcomes):
            raise RanksFailed(outcomes)
        return [outcome.value for outcome in outcomes]

    def start(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        init: str | None = "gloo",
        collective_timeout: float = 60.0,
        echo: Echo | None = None,
    ) -> Job:
        """As `run`, without waiting: for faults while ranks work. `Job.wait` has the outcomes.

        The ranks of the job before, if any still run, are ended.
        """
        body = function_body(lambda: _call(function, arguments, init, collective_timeout))
        return self._start(body, echo)

    def run_command(
        self,
        command: Sequence[str],
        *,
        timeout: float | None = None,
        grace: float = 10.0,
        echo: Echo | None = None,
    ) -> list[Outcome]:
        """Run a command once per rank; how each ended."""
        return self.start_command(command, echo=echo).wait(timeout, grace=grace)

    def start_command(self, command: Sequence[str], *, echo: Echo | None = None) -> Job:
        """As `run_command`, without waiting."""
        if not command:
            raise InputError("command=[]: expected a program and its arguments")
        return self._start(command_body(command), echo)

    def start_plain(self, function: Callable[[], object], *, echo: Echo | None = None) -> Job:
        """Call a function in each rank, with nothing before or after; what it returns is lost."""

        def call() -> bytes:
            function()
            return b""

        return self._start(function_body(call), echo)

    def cut(self, node: int) -> None:
        """From now on all that a node sends or would receive is lost, without a sign to anybody."""
        self.network.cut(self._node(node))

    def heal(self, node: int) -> None:
        """Undo `cut`."""
        self.network.heal(self._node(node))

    def set_rate(self, node: int, bandwidth: str | None) -> None:
        """Give a node's link another bandwidth; None: no limit."""
        rate = None if bandwidth is None else parse_rate(bandwidth)
        self.network.set_rate(self._node(node), rate)

    def set_latency(self, node: int, latency: str) -> None:
        """Give a node another latency; half of it is in each message from or to the node."""
        self.network.set_latency(self._node(node), parse_time(latency))

    def kill(self, rank: int) -> None:
        """End a rank at once, as a machine would that loses power: SIGKILL."""
        self._signal(rank, signal.SIGKILL)

    def stop(self, rank: int) -> None:
        """Let a rank stand still: SIGSTOP."""
        self._signal(rank, signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        """Undo `stop`."""
        self._signal(rank, signal.SIGCONT)

    def _start(self, body: Body, echo: Echo | None) -> Job:
        network = self.network
        self._end_job()
        self._job = Job(network, places(self.spec.nodes, self.spec.ranks), body, echo)
        return self._job

    def _end_job(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.close()

    def _signal(self, rank: int, number: int) -> None:
        if self._job is None:
            raise InputError("no ranks run: call start before")
        if not 0 <= rank < self.spec.world_size:
            raise InputError(f"rank={rank}: the cluster has the ranks 0 to {self.spec.world_size - 1}")
        self._job.signal(rank, number)

    def _node(self, node: int) -> int:
        if not 0 <= node < self.spec.nodes:
            raise ConfigError(f"node={node}: the cluster has the nodes 0 to {self.spec.nodes - 1}")
        return node


def _call(
    function: Callable[..., Any], arguments: Sequence[Any], init: str | None, collective_timeout: float
) -> bytes:
    """In the rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # the threads that this process had before the fork do not exist here
    if init is not None:
        dist.init_process_group(init, timeout=timedelta(seconds=collective_timeout))
    data = encode(function(*arguments))
    if dist.is_initialized():
        dist.destroy_process_group()
    return data
