"""What a process of a rank pool runs: calls that it reads from a pipe, each in a process group of its own."""

from __future__ import annotations

import faulthandler
import os
import pickle
import re
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

# Imported before the ranks are forked: each takes a second or more, which in all ranks looks like a hang.
MODULES = (
    "flexpert.testing",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)
LOOPBACK = "lo"

Filter = tuple[Any, str, Any, str, int]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function for all ranks, where they meet, and how long a collective may take."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    store: str
    timeout: float
    filters: list[Filter]


def filters_now() -> list[Filter]:
    """The filters of warnings in force, weakest first, in a form that can be sent."""
    return [
        (action, _text(message), category, _text(module), line)
        for action, message, category, module, line in reversed(warnings.filters)
    ]


def _text(pattern: re.Pattern[str] | str | None) -> str:
    if pattern is None:
        return ""
    return pattern if isinstance(pattern, str) else pattern.pattern


def serve(pipe: Connection, rank: int, world_size: int, log: str) -> None:
    """Run calls until the pipe closes; after one that raises, report it and end, which frees those who wait.

    A report is (True, result) or (False, traceback). SIGUSR1 writes to `log` what this process is at.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides
    torch.set_num_threads(1)
    if LOOPBACK in {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK  # else gloo asks for the address of this machine's name
    with Path(log).open("w", encoding="utf-8") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        while True:
            try:
                message = pipe.recv_bytes()
            except EOFError:
                return
            try:
                report = pickle.dumps((True, _run(message, rank, world_size)))
            except BaseException:  # noqa: BLE001 - told to the caller, who raises it
                pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)
            pipe.send_bytes(report)


def _run(message: bytes, rank: int, world_size: int) -> Any:
    # The group of the last call ends here: by now all ranks have reported, so that none still waits in it.
    if dist.is_initialized():
        dist.destroy_process_group()
    call = pickle.loads(message)  # noqa: S301 - from our own parent
    store = dist.FileStore(call.store, world_size)  # type: ignore[attr-defined]
    limit = timedelta(seconds=call.timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, text, category, module, line in call.filters:
            warnings.filterwarnings(action, text, category, module, line)
        return call.function(*call.args)
