"""A command on several processes of this machine, as torchrun starts them, with one voice."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import IO

import torch.distributed as dist

from flexpert.core.errors import DistributedError

GRACE = 5.0  # seconds that the others get to end by themselves after a failure
TAIL = 4000  # characters of a failed rank's errors that are told
_PR_SET_PDEATHSIG = 1
_LOOPBACK = "lo"


def launch(command: Sequence[str], ranks: int) -> None:
    """Run a command on so many processes, and return when all have succeeded.

    Rank 0 has this process's standard streams; of the others only the errors of one that fails are shown.
    All end with this process, also when it is killed (on Linux).

    Args:
        command: program and arguments.
        ranks: number of processes, >= 1.

    Raises:
        DistributedError: a process failed; the others have been ended.
        KeyboardInterrupt: at Ctrl-C; all have been ended.
    """
    # The store is here, on a port that is never free in between; the ranks are told that it has a host.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(ranks)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                processes.append(_start(command, rank, ranks, store.port, errors[rank]))  # noqa: PERF401
            failed = _wait(processes)
        finally:
            _end(processes)
        if failed is None:
            return
        _tell(failed, errors[failed])
        status = processes[failed].returncode
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    raise DistributedError(f"rank {failed} of {ranks} ended {how}; what it said is above")


def environment_of(rank: int, ranks: int, port: int, own: Mapping[str, str]) -> dict[str, str]:
    """What a rank finds in its environment: that of this process and what torchrun would set."""
    result = {**own, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    result |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    result |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    result.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if _LOOPBACK in {name for _, name in socket.if_nameindex()}:
        result.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    return result


def _start(
    command: Sequence[str], rank: int, ranks: int, port: int, errors: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command),
        env=environment_of(rank, ranks, port, os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if rank else None,
        stderr=errors if rank else None,
        start_new_session=True,  # Ctrl-C is for this process, which ends them
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - one call of libc
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that fails, after others had time to do so too; None when all have succeeded."""
    while True:
        status = [process.poll() for process in processes]
        bad = [rank for rank, code in enumerate(status) if code]
        if bad:
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(0.05)
            return bad[0]
        if all(code == 0 for code in status):
            return None
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.02)
    for process in processes:
        process.kill()  # nothing where it has ended
        process.wait()


def _tell(rank: int, errors: IO[bytes]) -> None:
    errors.seek(0)
    text = errors.read().decode(errors="replace")[-TAIL:].strip()
    sys.stderr.write("".join(f"rank {rank}: {line}\n" for line in text.splitlines()))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
