"""Signs of life: which rank is lost, and which has given up and why, told without a collective.

A thread per rank writes a running number to the process group's store every interval, and reads those of the
others. A rank is lost when its number stands still; the clocks of machines are not compared. Only the thread
speaks to the store, over a connection of its own: a store that hangs (its host is stopped) holds up nobody,
and is told as such.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from flexpert.core.errors import ConfigError, DistributedError

PATIENCE = 3.0  # intervals without a sign of life after which a rank counts as lost
# A rank's message is one of these words, "|", and the running number or the reason. FOLLOWED: it gave up
# because a collective failed, so another is to blame.
ALIVE, LEFT, FAILED, FOLLOWED = "alive", "left", "failed", "followed"


_running: list[Heartbeat] = []


class Lost(NamedTuple):
    """A rank and the seconds since its last sign of life; None: it never gave one."""

    rank: int
    seconds: float | None


class Heartbeat:
    """This rank's signs of life and what it knows of the others'.

    No method calls the store; those that wait, `abort`, `verdict` and `stop`, do so for a bounded time.

    Args:
        store: of the process group; it needs `clone`, as TCPStore and FileStore have it.
        rank: of this process.
        ranks: all that take part, this one too.
        interval: seconds between two signs of life; a rank counts as lost after three without.
        name: tells these ranks from others on the same store; the same on all of them.

    Raises:
        ConfigError: the interval is not positive.
    """

    def __init__(
        self, store: Store, rank: int, ranks: Sequence[int], interval: float, name: str = ""
    ) -> None:
        if not interval > 0:
            raise ConfigError(f"heartbeat={interval!r}: expected seconds > 0")
        self.rank, self.ranks, self.interval = rank, tuple(ranks), float(interval)
        self.patience = PATIENCE * self.interval
        self._store = PrefixStore(f"flexpert/heartbeat/{name}", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=max(1.0, self.patience)))
        self._lock = threading.Lock()
        self._wake, self._told = threading.Event(), threading.Event()
        self._own = ALIVE  # what to tell, without the running number
        self._followed = False
        self._born = self._read = time.monotonic()
        self._unanswered: float | None = None  # since when the store has not answered
        self._gone = False  # its connection is closed
        self._last: dict[int, tuple[str, float]] = {}  # rank -> its message, when that was new
        self._pid = os.getpid()
        self._world = weakref.ref(dist.distributed_c10d._get_default_group())
        self._thread = threading.Thread(target=self._run, name="flexpert heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.stop)
        _running.append(self)

    def lost(self) -> list[Lost]:
        """Ranks without a sign of life for three intervals, the longest silent first.

        Empty while the store does not answer: nothing is known then, see `store_silence`.
        """
        if self.store_silence():
            return []
        with self._lock:
            read, last = self._read, dict(self._last)
        lost = []
        for rank in self.ranks:
            message, new = last.get(rank, (ALIVE, None))
            silent = read - (self._born if new is None else new)
            if rank != self.rank and message.startswith(ALIVE) and silent > self.patience:
                lost.append(Lost(rank, None if new is None else silent))
        return sorted(lost, key=lambda one: -(one.seconds or float("inf")))

    def store_silence(self) -> float:
        """Seconds for which the store has not answered; 0.0 below three intervals, unless it hung up."""
        with self._lock:
            silence = 0.0 if self._unanswered is None else time.monotonic() - self._unanswered
            return silence if silence > self.patience or self._gone else 0.0

    def failed(self) -> dict[int, str]:
        """From each other rank that gave up to its reason."""
        return self._others(FAILED)

    def abort(self, reason: str) -> None:
        """Tell the others that this rank gives up; who waits for it raises `DistributedError` at once.

        The last word of this rank: it gives no signs of life after that. Waits a short time until it is told.
        """
        self._end(f"{FAILED}|{reason}")

    def stop(self) -> None:
        """End the thread, telling the others that this rank left; called at the exit of the process too."""
        atexit.unregister(self.stop)
        self._forget()
        error = getattr(sys, "last_value", None)  # of an interpreter that ends with a traceback
        if self._followed or isinstance(error, DistributedError):
            self._end(FOLLOWED)
        elif error is not None:
            self._end(f"{FAILED}|{type(error).__name__}: {error}")
        else:
            self._end(LEFT)

    def verdict(self) -> str:
        """Why a collective failed, as far as signs of life tell; waits until they could."""
        self._followed = True
        pause = min(self.interval / 10, 0.1)
        # Counted, not by the clock: a process that stood still itself must read before it may judge.
        for _ in range(math.ceil((self.patience + 2 * self.interval) / pause)):
            if self._known():
                break
            time.sleep(pause)
        return self._known() or (
            "every rank shows signs of life: one may be late, in other code, or cut off from data connections"
        )

    def is_of_this_world(self) -> bool:
        """Whether the default process group is still the one that this was made for."""
        return dist.is_initialized() and self._world() is dist.distributed_c10d._get_default_group()

    def _known(self) -> str:
        """Who is to blame, or empty."""
        told = [f"rank {rank} gave up: {reason}" for rank, reason in self.failed().items()]
        told += [
            f"rank {rank} never gave a sign of life"
            if seconds is None
            else f"rank {rank} is lost: no sign of life for {seconds:.1f} s"
            for rank, seconds in self.lost()
        ]
        told += [f"rank {rank} ended or closed its mesh" for rank in self._others(LEFT)]
        if not told and (silence := self.store_silence()):
            state = "has hung up" if self._gone else f"does not answer for {silence:.1f} s"
            told = [
                f"the store {state}: its host, rank 0 or torchrun's agent, may be lost, or this machine cut "
                f"off from it; of the other ranks nothing is known"
            ]
        return "; ".join(told)

    def _others(self, word: str) -> dict[int, str]:
        with self._lock:
            messages = {rank: message for rank, (message, _) in self._last.items() if rank != self.rank}
        return {
            rank: message.partition("|")[2]
            for rank, message in sorted(messages.items())
            if message.startswith(word)
        }

    def _end(self, word: str) -> None:
        if os.getpid() != self._pid:  # a forked child has no thread
            return
        with self._lock:
            self._own = word if self._own == ALIVE else self._own
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._told.wait(min(self.patience, 5.0))

    def _run(self) -> None:
        beat = 0
        while True:
            with self._lock:
                own = self._own
            beat += 1
            self._round(f"{ALIVE}|{beat}" if own == ALIVE else own)
            if own != ALIVE or self._gone:
                break
            self._wake.wait(self.interval)
            if not self.is_of_this_world():
                self._end(LEFT)  # the world that this belongs to has been closed
        self._forget()
        self._told.set()

    def _forget(self) -> None:
        """No longer the heartbeat of any group; by whichever of thread and caller comes first."""
        with contextlib.suppress(ValueError):
            _running.remove(self)

    def _round(self, message: str) -> None:
        """Tell the own message and read the others'."""
        with self._lock:
            self._unanswered = self._unanswered or time.monotonic()
        try:
            self._store.set(str(self.rank), message)
            known = [r for r in self.ranks if r in self._last or self._store.check([str(r)])]
            messages = self._store.multi_get([str(rank) for rank in known])
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to; `verdict` tells
            with self._lock:
                self._gone = isinstance(error, dist.DistNetworkError)
            return
        with self._lock:
            self._unanswered, self._gone, self._read = None, False, time.monotonic()
            for rank, raw in zip(known, messages, strict=True):
                text = raw.decode(errors="replace")
                if rank not in self._last or self._last[rank][0] != text:
                    self._last[rank] = text, self._read


def heartbeat_for(store: Store, ranks: Sequence[int], interval: float | None, name: str) -> Heartbeat | None:
    """The heartbeat that `expert_mesh(heartbeat=interval)` asks for; None where there is none."""
    if interval is None:
        # Over TCP it costs a fraction of a millisecond. A file would grow with every sign of life.
        interval = 2.0 if _over_tcp(store) else 0.0
    if interval == 0 or len(ranks) == 1:
        return None
    return Heartbeat(store, dist.get_rank(), ranks, interval, name)


def heartbeat_of(ranks: Sequence[int]) -> Heartbeat | None:
    """A heartbeat of the current world in which all these ranks take part; None where there is none."""
    known = [beat for beat in list(_running) if set(ranks) <= set(beat.ranks) and beat.is_of_this_world()]
    return known[-1] if known else None


def _over_tcp(store: Store) -> bool:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return isinstance(store, TCPStore)
