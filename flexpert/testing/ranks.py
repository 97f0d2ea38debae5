"""Functions run on several ranks of one machine, joined by gloo: for tests of whatever communicates.

The ranks come from a fork server that has imported PyTorch once, so four of them start in a fraction of a
second, and neither threads nor state of the caller's process reach them. They are kept for the next call; the
process group is not.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError, DistributedError

from .rank_process import MODULES, Call, filters_now, serve

GRACE = 10.0  # seconds that the others get to report what they saw of a failure
WRITTEN = 1.0  # seconds after which tracebacks that grow no more are whole: they are written in many pieces

Told = tuple[int, str]  # a rank, and what is told of it

_pools: dict[int, RankPool] = {}


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo world and collect what the ranks return.

    Each call has a default process group of its own, the generator seeded with 0, one thread per rank and the
    caller's filters of warnings. The ranks' processes are kept for later calls of the same size; so is what
    functions leave in modules.

    Args:
        function: found in its module by name, so neither a lambda nor a local function. It learns its place
            from torch.distributed.
        world_size: number of ranks, >= 1.
        args: of the call, the same on all ranks; copied, tensors too.
        timeout: seconds after which the ranks are stopped.

    Returns:
        The ranks' results in order. They are copied, tensors too.

    Raises:
        DistributedError: a rank raised, died, or did not finish in time; with the traceback of each rank that
            failed, the first failure first, or of what each was doing.
    """
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    return _pools[world_size].run(function, *args, timeout=timeout)


class RankPool:
    """Processes of the ranks 0 to world_size - 1, started when first needed.

    Raises:
        ConfigError: `world_size` is below 1.
    """

    def __init__(self, world_size: int) -> None:
        if world_size < 1:
            raise ConfigError(f"world_size={world_size}; at least one rank is needed")
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """As `run_ranks`, on these processes; after a failure the next call starts new ones."""
        self._start()
        assert self._folder is not None
        self._calls += 1
        store = str(Path(self._folder.name) / f"store{self._calls}")
        call = Call(function=function, args=args, store=store, timeout=timeout, filters=filters_now())
        message = pickle.dumps(call)
        failures: list[Told] = []
        results: dict[int, Any] = {}
        try:
            for pipe in self._pipes:
                pipe.send_bytes(message)
            self._collect(results, failures, timeout)
        except BaseException:
            self.close()
            raise
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        missing = sorted(set(range(self.world_size)) - results.keys() - {rank for rank, _ in failures})
        stuck = [(rank, self._doing(rank)) for rank in missing]
        self.close()
        name = f"{function.__module__}.{function.__qualname__}"
        raise DistributedError(_message(name, self.world_size, timeout, failures, stuck))

    def close(self) -> None:
        """Stop the processes; `run` would start new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.close()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(MODULES))
        self._folder = tempfile.TemporaryDirectory(prefix="flexpert-ranks-")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            log = str(_log(self._folder.name, rank))
            process = context.Process(target=serve, args=(theirs, rank, self.world_size, log), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, results: dict[int, Any], failures: list[Told], timeout: float) -> None:
        """Fill in what ranks report until all have, or the time is up; a failure leaves the others GRACE."""
        waiting = dict(zip(self._pipes, range(self.world_size), strict=True))
        deadline = time.monotonic() + timeout
        while waiting and (ready := connection.wait(list(waiting), max(deadline - time.monotonic(), 0))):
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                rank = waiting.pop(pipe)
                try:
                    succeeded, value = pickle.loads(pipe.recv_bytes())  # noqa: S301 - from our own child
                except (EOFError, ConnectionError):
                    succeeded, value = False, self._death(rank)
                if succeeded:
                    results[rank] = value
                else:
                    failures.append((rank, value))
                    deadline = min(deadline, time.monotonic() + GRACE)

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(GRACE)
        code = process.exitcode
        cause = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
        return f"the process ended with {cause} and reported nothing\n"

    def _doing(self, rank: int) -> str:
        """The tracebacks of a rank's threads at this moment."""
        assert self._folder is not None
        log, pid = _log(self._folder.name, rank), self._processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        now = time.monotonic()
        deadline, grown, text = now + GRACE, now, ""
        while now < deadline and not (text and now > grown + WRITTEN):
            time.sleep(0.05)
            now = time.monotonic()
            if (more := log.read_text(encoding="utf-8")) != text:
                text, grown = more, now
        return text or "nothing it could tell\n"


def _log(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.log"


def _message(
    name: str, world_size: int, timeout: float, failures: Sequence[Told], stuck: Sequence[Told]
) -> str:
    parts = [f"{name} on {world_size} ranks:"]
    if failures:
        parts += [f"--- rank {rank} failed ---\n{text}" for rank, text in failures]
    else:
        parts[0] += f" not finished after {timeout:g} s"
    parts += [f"--- rank {rank} was stopped while at ---\n{text}" for rank, text in stuck]
    return "\n".join(parts)


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()
    _pools.clear()
