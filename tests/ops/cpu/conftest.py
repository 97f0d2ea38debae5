"""Native kernels: live or skipped, and a process state in which they have not been looked for."""

from __future__ import annotations

import os

import pytest
import torch

from flexpert import ops
from flexpert.ops import select
from flexpert.ops.cpu import build


@pytest.fixture(scope="session")
def found():
    """What there is, looked for once, unless the environment says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXPERT_NATIVE", os.environ.get("FLEXPERT_NATIVE", "auto"))
        patch.setattr(build, "_native", None)
        return build.native()


@pytest.fixture
def live(found, monkeypatch):
    """Every operator the native backend has runs on it."""
    if found.library is None:
        pytest.skip(f"native kernels are off: {found.reason}")
    monkeypatch.setenv("FLEXPERT_NATIVE", "require")  # for child processes
    monkeypatch.setattr(build, "_native", found)
    with ops.use_backend("native"):
        yield found


@pytest.fixture
def preferred(found, monkeypatch):
    """The native backend runs what it can, and others the rest."""
    if found.library is None:
        pytest.skip(f"native kernels are off: {found.reason}")
    monkeypatch.setattr(build, "_native", found)
    monkeypatch.setattr(select, "_live", {})


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
