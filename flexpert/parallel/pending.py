"""A collective under way, and what is told when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from flexpert.core.errors import DistributedError

from .heartbeat import Heartbeat

POLL = 0.5  # seconds between two looks for a rank that gave up; waiting itself ends without delay


_POLL = timedelta(seconds=POLL)


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
                work.wait(_POLL)
                return
            except RuntimeError:
                # The short wait is over, or the work has failed: then the next wait ends at once.
                if work.is_completed():
                    work.wait()  # raises what failed, returns if it was done just now
                    return
                if time.monotonic() - begin < POLL / 2 or self._heartbeat.failed():
                    raise


class named:  # noqa: N801 - a `with` that reads as one; a generator would cost each call several times as much
    """Put the layer's name before what a collective inside tells, in backward passes too."""

    def __init__(self, layer: str) -> None:
        self._layer = layer

    def __enter__(self) -> None:
        """Nothing is done before."""

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Raise the error with the name."""
        if isinstance(error, DistributedError) and not str(error).startswith(self._layer):
            raise DistributedError(f"{self._layer}: {error}") from error


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
