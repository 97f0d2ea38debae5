"""Native kernels: live or skipped, and a process state in which they have not been looked for."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from flexpert import ops
from flexpert.ops import select
from flexpert.ops.cpu import build
from flexpert.ops.cpu.processor import processor

NEEDED = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "amx": {"amx_bf16"},
}


def pytest_generate_tests(metafunc):
    """`each_cap`: with all that the processor has, up to FLEXPERT_INSTRUCTIONS, and with less of it."""
    if metafunc.definition.get_closest_marker("each_cap"):
        caps = build.CAPS[: build.CAPS.index(build.cap()) + 1]
        metafunc.parametrize("cap", [cap for cap in caps if NEEDED[cap] <= processor()[1]], indirect=True)


@pytest.fixture
def cap(request):
    """The most that kernels may use; None for what the environment says."""
    return getattr(request, "param", None)


@pytest.fixture(scope="session")
def found():
    """What there is, looked for once, unless the environment says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXPERT_NATIVE", os.environ.get("FLEXPERT_NATIVE", "auto"))
        patch.setattr(build, "_native", None)
        return build.native()


@pytest.fixture
def live(found, cap, monkeypatch):
    """Every operator the native backend has runs on it."""
    if found.library is None:
        pytest.skip(f"native kernels are off: {found.reason}")
    monkeypatch.setenv("FLEXPERT_NATIVE", "require")  # for child processes
    if cap:
        monkeypatch.setenv("FLEXPERT_INSTRUCTIONS", cap)
        found = replace(found, cap=cap)
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
