"""A collective under way, and what is told when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from flexpert.core.errors import DistributedError

from .heartbeat import Heartbeat

POLL = 0.5  # seconds between two looks for a rank that gave up; waiting itself ends without delay


class Pending:
    """A collective under way. It keeps its buffers alive until it is waited for.

    Args:
        label: the operation and its group, for messages.
        work: of torch.distributed; None if the result is there.
        keep: buffers.
        finish: called when the result is there.
        end: of an event of a timeline.
        heartbeat: knows of lost ranks; None: nobody does.
        on_host: waiting blocks this thread (gloo), so that it can look for ranks that gave up.
    """

    def __init__(
        self,
        label: str,
        work: dist.Work | None = None,
        *,
        keep: tuple[Tensor, ...] = (),
        finish: Callable[[], object] | None = None,
        end: Callable[[], None] | None = None,
        heartbeat: Heartbeat | None = None,
        on_host: bool = False,
    ) -> None:
        self._label = label
        self._work = work
        self._keep = keep
        self._finish = finish
        self._end = end
        self._heartbeat = heartbeat
        self._on_host = on_host
        self._begin = time.monotonic()

    def wait(self) -> None:
        """Return when the result is there (on CUDA: for work queued on the current stream from now on).

        Raises:
            DistributedError: the collective failed: a rank is gone or too late, or called something else.
        """
        if self._work is not None:
            try:
                self._wait_for(self._work)
            except RuntimeError as error:
                raise self.error(error) from error
        if self._finish is not None:
            self._finish()
        if self._end is not None:
            self._end()
        self._work, self._keep, self._finish, self._end = None, (), None, None

    def future(self) -> torch.futures.Future[list[Tensor]]:
        """Done when the result is there, also where nobody waits; to be asked for before `wait`."""
        if self._work is None:
            done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
            done.set_result(list(self._keep))
            return done
        return self._work.get_future()

    def error(self, cause: Exception) -> DistributedError:
        """What to raise for a failure of the backend."""
        waited = time.monotonic() - self._begin
        return failure(f"{self._label} failed after {waited:.1f} s", cause, self._heartbeat)

    def _wait_for(self, work: dist.Work) -> None:
        if self._heartbeat is None or not self._on_host:
            work.wait()
            return
        while True:
            begin = time.monotonic()
            try:
                work.wait(timedelta(seconds=POLL))
                return
            except RuntimeError:
                # The short wait is over, or the work has failed. Gloo's reduce_scatter never says that it is
                # completed, and waits as long as it takes; once failed, it ends the next wait at once.
                if work.is_completed():
                    work.wait()  # raises what failed, returns if it was done just now
                    return
                if time.monotonic() - begin < POLL / 2 or self._heartbeat.failed():
                    raise


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put the layer's name before what a collective inside tells, in backward passes too."""
    try:
        yield
    except DistributedError as error:
        if str(error).startswith(layer):
            raise
        raise DistributedError(f"{layer}: {error}") from error


def failure(what: str, cause: Exception, heartbeat: Heartbeat | None) -> DistributedError:
    """The error for `what`, with the lost ranks where signs of life tell them.

    A backend names the address of the first connection that failed to it; when one rank's failure makes the
    next fail, that is an innocent one. So its words come last and are marked as what they are.
    """
    if heartbeat is None:
        verdict = "which rank is lost is not known (call expert_mesh with heartbeat=1.0 to be told)"
    else:
        verdict = heartbeat.verdict()
    backend = str(cause).partition(" This is typically")[0].strip()
    return DistributedError(
        f"{what}: {verdict}. The backend's words, in which an address need not be the lost rank's: {backend}"
    )
