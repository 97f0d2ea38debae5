"""One rank: a forked process in its node, that runs a command in its place or a function in itself."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

from .environment import Place, rank_environment, set_allocator
from .namespaces import quiet_fork
from .network import Network

PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # exit status, as a shell has it

# What a rank does: it gets the descriptor to write its result to.
Body = Callable[[int], None]


class Rank:
    """A running rank, seen from its owner.

    Attributes:
        place: where it is.
        out, err, result: descriptors to read from: its two streams, and what it returns.
    """

    def __init__(self, network: Network, place: Place, port: int, body: Body) -> None:
        self.place = place
        environment = rank_environment(network, place, port)
        read, write = zip(*(os.pipe() for _ in range(3)), strict=True)
        self.out, self.err, self.result = read

        # Until the child has signal handlers of its own, those of its owner would run in it, and unwind into
        # the owner's clean-up.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

        def child() -> None:
            for descriptor in read:
                os.close(descriptor)
            _reset_signals(mask)
            _become(network, place, environment, write)
            body(write[2])

        self._process = multiprocessing.get_context("fork").Process(target=child, name=str(place))
        try:
            with quiet_fork():
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for descriptor in write:
                os.close(descriptor)
        pid = self._process.pid
        assert pid is not None
        self.pid = pid
        self.ended = os.pidfd_open(pid)  # readable once it has ended

    @property
    def exit_code(self) -> int | None:
        """As `subprocess` has it: None while it runs, negative for a signal."""
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Send a signal to it and what it started; nothing if it has ended."""
        if self.exit_code is None:
            self._signal_group(number)

    def close(self) -> None:
        """End what is left of it and let go of the descriptors."""
        self._signal_group(signal.SIGKILL)  # also what it left behind in its group
        self._process.join()
        self._process.close()
        for descriptor in (self.out, self.err, self.result, self.ended):
            os.close(descriptor)

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it ended, or has not come to lead its group yet
            if self.exit_code is None:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, number)


def _reset_signals(mask: Iterable[int]) -> None:
    """In the child: the handlers of a fresh process, and the owner's mask."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _become(network: Network, place: Place, environment: dict[str, str], pipes: Sequence[int]) -> None:
    """In the child: a process of its node, with streams and environment of its own."""
    parent = os.getppid()
    os.setsid()
    network.enter(place.node)
    network.forget()
    # After entering: a change of credentials clears it. Its owner's end is its own, even by SIGKILL.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os.dup2(pipes[0], 1)
    os.dup2(pipes[1], 2)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)


def command_body(command: Sequence[str]) -> Body:
    """A rank that becomes this command."""

    def body(result: int) -> None:
        os.close(result)
        _execute(command)

    return body


def _execute(command: Sequence[str]) -> NoReturn:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)


def function_body(function: Callable[[], bytes]) -> Body:
    """A rank that runs this function; its bytes are the result."""

    def body(result: int) -> None:
        set_allocator()
        data = function()
        with open(result, "wb") as stream:
            stream.write(data)

    return body
