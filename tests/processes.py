"""Waiting for what happens in other processes, and finding them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE = 120.0  # seconds for what takes milliseconds, on a machine that may be busy


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def sleeping(seconds: str) -> int:
    """How many processes are `sleep SECONDS`."""
    found = 0
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # one that ends meanwhile
            found += command.read_bytes() == f"sleep\0{seconds}\0".encode()
    return found
