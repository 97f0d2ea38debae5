"""Native kernels: live or skipped, and a process state in which they have not been looked for."""

from __future__ import annotations

import pytest
import torch

from flexpert import ops
from flexpert.ops import select
from flexpert.ops.cpu import build


@pytest.fixture
def live(monkeypatch):
    """Every operator the native backend has runs on it."""
    monkeypatch.setenv("FLEXPERT_NATIVE", "auto")
    monkeypatch.setattr(build, "_native", None)
    found = build.native()
    if found.library is None:
        pytest.skip(f"native kernels are off: {found.reason}")
    with ops.use_backend("native"):
        yield found


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process: no library was looked for, no backend chosen."""
    monkeypatch.setenv("FLEXPERT_NATIVE", "auto")
    monkeypatch.setattr(build, "_native", None)
    monkeypatch.setattr(select, "_live", {})


@pytest.fixture
def threads():
    """A function that sets their number, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
