"""Links by a switch in user space, for kernels without a delay queue: csrc/switch.cpp on TAP devices."""

from __future__ import annotations

import select
import subprocess
from contextlib import suppress
from dataclasses import dataclass

from flexpert.core.errors import DistributedError

from .namespaces import Namespace
from .network import NamespaceNetwork
from .program import build
from .spec import ClusterSpec

ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Traffic:
    """Bytes that a node sent and received over its link, frames lost on the way there and back."""

    sent: int
    received: int
    dropped: int


class SwitchNetwork(NamespaceNetwork):
    """Mode "switch": bandwidth and latency at the cost of some processor time per frame."""

    mode = "switch"

    def __init__(self, spec: ClusterSpec, spaces: list[Namespace]) -> None:
        super().__init__(spec, spaces)
        taps = [space.tap for space in self.nodes if space.tap is not None]
        ports = [
            str(word)
            for tap, rate, latency in zip(taps, spec.rates, spec.latencies, strict=True)
            for word in (tap, rate or 0, latency // 2)
        ]
        self._process = subprocess.Popen(
            [str(build()), *ports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=taps,
            start_new_session=True,  # Ctrl-C is for its owner, who ends it last
        )
        try:
            answer = self._read()
            if not answer.startswith("ready"):
                raise DistributedError(f"the switch did not start: {answer or 'it ended'}")
            self.realtime = answer == "ready realtime"
            self.configure_nodes()
        except BaseException:
            self._stop()
            raise

    def cut(self, node: int) -> None:
        """The switch drops its frames, also those under way."""
        self._ask(f"cut {node}")

    def heal(self, node: int) -> None:
        """The switch forwards again."""
        self._ask(f"heal {node}")

    def set_rate(self, node: int, rate: int | None) -> None:
        """From the next frame on."""
        self._ask(f"rate {node} {rate or 0}")

    def set_latency(self, node: int, latency: int) -> None:
        """From the next frame on; with a shorter one, frames may overtake those under way."""
        self._ask(f"delay {node} {latency // 2}")

    def traffic(self, node: int) -> Traffic:
        """What went over a node's link so far."""
        sent, received, dropped = (int(word) for word in self._ask(f"stats {node}").split()[1:])
        return Traffic(sent, received, dropped)

    def close(self) -> None:
        """End the switch, then let the namespaces go."""
        self._stop()
        super().close()

    def forget(self) -> None:
        """Also the switch's input, whose end ends it."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        super().forget()

    def _ask(self, line: str) -> str:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(line.encode() + b"\n")
        except (OSError, ValueError) as error:
            raise DistributedError(f"the switch ended (exit status {self._process.poll()})") from error
        answer = self._read()
        if not answer.startswith("ok"):
            raise DistributedError(f"the switch refused {line!r}: {answer or 'it ended'}")
        return answer

    def _read(self) -> str:
        """A line, "" if the switch ended or does not answer."""
        stdout, line = self._process.stdout, b""
        assert stdout is not None
        while not line.endswith(b"\n"):
            if not select.select([stdout], [], [], ANSWER_SECONDS)[0]:
                return ""
            if not (piece := stdout.read(1)):
                return ""
            line += piece
        return line.decode().strip()

    def _stop(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
