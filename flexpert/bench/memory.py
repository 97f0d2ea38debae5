"""Peak memory of one training step, in forked children; to be measured before any thread is started.

A forked child has the threads of its parent in no other state than "gone", so it computes on one thread; and
the parent must not have started any, or the libraries in the child would wait for them.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .implementations import FAILURES, TRAINING, Implementation, UnavailableError
from .measure import make_run
from .problem import Shape, make_problem

SECONDS = 120.0  # a child that takes longer hangs, or swaps
STATUS = Path("/proc/self/status")


def in_child(work: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What `work` returns (a value for JSON) in a forked child; None if it fails or takes too long."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    parts = []
    while select.select([read], [], [], seconds)[0] and (part := os.read(read, 65536)):
        parts.append(part)
    os.close(read)
    os.kill(child, signal.SIGKILL)  # not yet waited for, so the id is still its own
    os.waitpid(child, 0)
    try:
        return json.loads(b"".join(parts))
    except ValueError:
        return None


def peaks(
    shape: Shape, dtype: torch.dtype, implementations: Sequence[Implementation]
) -> dict[str, float | None]:
    """Peak resident MiB of a process that makes one training step, PyTorch and the inputs included.

    Absent where it cannot be measured: forward-only implementations, systems without fork or /proc.
    """
    chosen = [implementation for implementation in implementations if TRAINING in implementation.modes]
    if not chosen or not hasattr(os, "fork") or not STATUS.exists():
        return {}

    def work() -> dict[str, float | None]:
        torch.set_num_threads(1)
        problem = make_problem(shape, dtype)

        def peak(implementation: Implementation) -> float | None:
            try:
                make_run(implementation, implementation.build(problem), problem, TRAINING)()
            except (UnavailableError, *FAILURES):
                return None
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return round(int(line.split()[1]) / 1024, 1)

        return {item.name: in_child(partial(peak, item)) for item in chosen}

    return in_child(work, SECONDS * len(chosen)) or {}
