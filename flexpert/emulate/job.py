"""Ranks that run together: their output, their ends, and nobody waits forever."""

from __future__ import annotations

import math
import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from .environment import Place
from .network import Network
from .outcome import Outcome
from .ranks import Body, Rank
from .values import decode

KEPT_BYTES = 16384  # of each rank's output, for reports
LINE_BYTES = 65536  # a longer line is shown in pieces
TERMINATION_SECONDS = 3.0  # between SIGTERM and SIGKILL

Echo = Callable[[Place, int, bytes], None]  # place, 1 or 2 for the stream, a line with its end


class _Member:
    """A rank and what has been read from it."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.lines = {1: b"", 2: b""}
        self.kept = b""
        self.result = b""
        self.ended_by_us = ""
        self.outcome: Outcome | None = None


class Job:
    """Running ranks.

    `wait` moves their output: before it is called, a rank that writes more than a pipe holds stands still.
    """

    def __init__(
        self, network: Network, places: Sequence[Place], body: Body, echo: Echo | None = None
    ) -> None:
        self._echo = echo
        self._begin = time.monotonic()
        self._members: list[_Member] = []
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        port = network.free_port()
        try:
            for place in places:
                self._add(Rank(network, place, port, body))
        except BaseException:
            self.close()
            raise

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call back from `wait` whenever there is something to read."""
        self._selector.register(descriptor, selectors.EVENT_READ, callback)

    def unwatch(self, descriptor: int) -> None:
        """End `watch`."""
        self._selector.unregister(descriptor)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back from `wait`, that long after the start of the ranks."""
        self._timers.append((self._begin + seconds, callback))
        self._timers.sort(key=lambda timer: timer[0])

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank and what it started."""
        self._members[rank].rank.signal(number)

    def wait(
        self, timeout: float | None = None, *, grace: float = 10.0, keep_going: bool = False
    ) -> list[Outcome]:
        """Wait for all ranks.

        Args:
            timeout: seconds from now, after which those that still run are ended.
            grace: seconds that the others have after one has failed.
            keep_going: leave the others alone after one has failed.

        Returns:
            How each ended, by rank.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        grace_end = math.inf
        while running := self._running():
            self._step(min(end, grace_end))
            now = time.monotonic()
            if now >= end:
                self._terminate(running, f"timeout of {timeout:g} s")
            elif now >= grace_end:
                self._terminate(running, "another rank failed")
            elif not keep_going and grace_end == math.inf and self._any_failed():
                grace_end = now + grace
        return [member.outcome for member in self._members if member.outcome is not None]

    def close(self) -> None:
        """End the ranks that still run, and let go of everything."""
        with suppress(KeyboardInterrupt):  # the second Ctrl-C: no more patience
            self._terminate(self._running(), "the job was closed")
        for member in self._members:
            member.rank.close()
        self._members = []
        self._selector.close()

    def _add(self, rank: Rank) -> None:
        member = _Member(rank)
        self._members.append(member)
        for descriptor in (rank.out, rank.err, rank.result):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, lambda: self._read(member))
        self._selector.register(rank.ended, selectors.EVENT_READ, lambda: self._end(member))

    def _running(self) -> list[_Member]:
        return [member for member in self._members if member.outcome is None]

    def _any_failed(self) -> bool:
        return any(member.outcome is not None and not member.outcome.ok for member in self._members)

    def _step(self, end: float) -> None:
        """Wait for something to happen until that time, and deal with it."""
        if self._timers:
            end = min(end, self._timers[0][0])
        wait = None if end == math.inf else max(0.0, end - time.monotonic())
        for key, _ in self._selector.select(wait):
            if key.fd in self._selector.get_map():  # an end takes all descriptors of its rank away
                key.data()
        while self._timers and self._timers[0][0] <= time.monotonic():
            self._timers.pop(0)[1]()

    def _terminate(self, members: Sequence[_Member], reason: str) -> None:
        for number, patience in ((signal.SIGTERM, TERMINATION_SECONDS), (signal.SIGKILL, math.inf)):
            end = time.monotonic() + patience
            running = [member for member in members if member.outcome is None]
            for member in running:
                member.ended_by_us = reason
                member.rank.signal(number)
                member.rank.signal(signal.SIGCONT)  # one that is stopped ends as well
            while any(member.outcome is None for member in running) and time.monotonic() < end:
                self._step(end)

    def _end(self, member: _Member) -> None:
        rank = member.rank
        code = rank.exit_code
        if code is None:
            return
        self._read(member)
        for descriptor in (rank.out, rank.err, rank.result, rank.ended):
            with suppress(KeyError):  # a stream that the rank closed before
                self._selector.unregister(descriptor)
        for stream in (1, 2):
            self._show(member, stream, b"\n" if member.lines[stream] else b"")
        value: Any = None
        if code == 0 and member.result:
            value = decode(member.result)
        member.outcome = Outcome(
            place=rank.place,
            exit_code=code,
            seconds=time.monotonic() - self._begin,
            value=value,
            output=member.kept.decode(errors="replace"),
            ended_by_us=member.ended_by_us,
        )

    def _read(self, member: _Member) -> None:
        """All that is there."""
        rank = member.rank
        for stream, descriptor in ((1, rank.out), (2, rank.err), (0, rank.result)):
            while data := self._read_piece(descriptor):
                if stream == 0:
                    member.result += data
                else:
                    self._show(member, stream, data)

    def _read_piece(self, descriptor: int) -> bytes:
        try:
            data = os.read(descriptor, LINE_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            with suppress(KeyError):
                self._selector.unregister(descriptor)
        return data

    def _show(self, member: _Member, stream: int, data: bytes) -> None:
        member.kept = (member.kept + data)[-KEPT_BYTES:]
        if self._echo is None:
            return
        *lines, rest = (member.lines[stream] + data).split(b"\n")
        for line in lines:
            self._echo(member.rank.place, stream, line + b"\n")
        if len(rest) > LINE_BYTES:
            self._echo(member.rank.place, stream, rest + b"\n")
            rest = b""
        member.lines[stream] = rest
