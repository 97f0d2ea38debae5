"""One run of `flexpert emulate`: ranks, their lines, faults on time or on demand, and an end in any case."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from flexpert.core.errors import ConfigError, FlexpertError

from .actions import parse_action
from .cluster import Cluster
from .environment import Place
from .job import Job
from .outcome import Outcome, describe_failures
from .python_command import PRELOADED, preload, program_to_fork, run_as_fresh

# Of a forked rank, which cannot raise PyTorch's log level any more: a namespace has no names, nor needs them.
HARMLESS = b"The hostname of the client socket cannot be retrieved"

_log = logging.getLogger("flexpert")


@dataclass(frozen=True, kw_only=True)
class Session:
    """What to run and how.

    Attributes:
        command: the words of the command, run once per rank.
        fork: as in `program_to_fork`.
        preload: modules to import before ranks are forked.
        only_rank: show the output of this rank alone.
        timeout, grace, keep_going: as in `Job.wait`.
        at: (nanoseconds, action) pairs, from the start of the ranks.
        control: path of a FIFO from which actions are read, one per line; made, and removed at the end.
        output: where standard output of ranks goes.
    """

    command: Sequence[str]
    fork: bool | None = None
    preload: Sequence[str] = ()
    only_rank: int | None = None
    timeout: float | None = None
    grace: float = 10.0
    keep_going: bool = False
    at: Sequence[tuple[int, str]] = ()
    control: Path | None = None
    output: IO[str] | None = None

    def run(self, cluster: Cluster) -> dict[str, Any]:
        """Run the command on a cluster that is not entered yet; how each rank ended.

        Raises:
            ConfigError: an option that cannot be, or a mode that is not possible here.
        """
        world = cluster.spec.world_size
        if self.only_rank is not None and not 0 <= self.only_rank < world:
            raise ConfigError(f"only_rank={self.only_rank}: the cluster has the ranks 0 to {world - 1}")
        if self.control is not None and (self.control.exists() or not self.control.parent.is_dir()):
            raise ConfigError(f"control={str(self.control)!r}: name a new file in a folder that exists")
        program = program_to_fork(self.command, self.fork)
        for _, text in self.at:
            parse_action(text, cluster.spec)  # refuses a wrong one now, not in the middle
        if program is not None:
            preload([*PRELOADED, *self.preload])
        begin = time.monotonic()
        with _ended_by_signals(), cluster:
            _log.info("emulating %s, mode %s", cluster.spec.describe(), cluster.mode)
            if program is None:
                job = cluster.start_command(self.command, echo=self._echo)
            else:
                gc.collect()
                gc.freeze()  # so that collections in ranks do not write to shared pages
                try:
                    job = cluster.start_plain(lambda: run_as_fresh(program), echo=self._echo)
                finally:
                    gc.unfreeze()
            for nanoseconds, text in self.at:
                job.call_later(nanoseconds / 1e9, _doer(cluster, text))
            with self._controlled(cluster, job):
                outcomes = job.wait(self.timeout, grace=self.grace, keep_going=self.keep_going)
            mode = cluster.mode
        return _result(cluster, mode, outcomes, time.monotonic() - begin)

    def _echo(self, place: Place, stream: int, line: bytes) -> None:
        if self.only_rank not in (None, place.rank) or HARMLESS in line:
            return
        target = sys.stderr if stream == 2 else self.output or sys.stdout
        target.write(f"{place.prefix} {line.decode(errors='replace')}")
        target.flush()

    @contextmanager
    def _controlled(self, cluster: Cluster, job: Job) -> Iterator[None]:
        """Obey the FIFO while ranks run."""
        if self.control is None:
            yield
            return
        try:
            os.mkfifo(self.control, 0o600)
        except OSError as error:
            raise ConfigError(f"control={str(self.control)!r}: {error.strerror}; name a new file") from error
        try:
            # For reading and writing: it has no end when a writer leaves.
            descriptor = os.open(self.control, os.O_RDWR | os.O_NONBLOCK)
            job.watch(descriptor, _Reader(cluster, descriptor))
            try:
                yield
            finally:
                job.unwatch(descriptor)
                os.close(descriptor)
        finally:
            self.control.unlink(missing_ok=True)


class _Reader:
    """Whole lines from a FIFO, done one by one."""

    def __init__(self, cluster: Cluster, descriptor: int) -> None:
        self._cluster, self._descriptor, self._rest = cluster, descriptor, b""

    def __call__(self) -> None:
        with suppress(BlockingIOError):
            self._rest += os.read(self._descriptor, 4096)
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").strip()
            if text:
                _doer(self._cluster, text)()


def _doer(cluster: Cluster, text: str) -> Callable[[], None]:
    """What does that action; a wrong one is told, and ends nothing."""

    def do() -> None:
        try:
            parse_action(text)(cluster)
        except FlexpertError as error:
            _log.warning("%s: %s", text, error)
        else:
            _log.info("%s: done", text)

    return do


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP leave through the same doors as an error does; while cleaning up they wait."""
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(cluster: Cluster, mode: str, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    failures = describe_failures(outcomes)
    return {
        "mode": mode,
        "nodes": cluster.spec.nodes,
        "ranks": cluster.spec.ranks,
        "missing": cluster.missing,
        "seconds": round(seconds, 3),
        "outcomes": [
            {
                "rank": outcome.place.rank,
                "node": outcome.place.node,
                "local_rank": outcome.place.local_rank,
                "exit_code": outcome.exit_code,
                "ended_by_us": outcome.ended_by_us,
                "seconds": round(outcome.seconds, 3),
            }
            for outcome in outcomes
        ],
        "failures": failures,
        "exit_status": 1 if failures else 0,
    }
