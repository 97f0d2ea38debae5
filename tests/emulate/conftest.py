"""Clusters for tests, or the reason why this machine cannot have them."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexpert.emulate.probe import Facilities, probe
from flexpert.emulate.spec import ClusterSpec

SHAPED = ("switch", "shape", "bandwidth")


@functools.cache
def found() -> Facilities:
    return probe()


def need(mode: str) -> None:
    """Skip where the mode is not possible."""
    spec = ClusterSpec.parse(2, 1, "100mbit")
    if why := found().why_not(mode, spec):
        pytest.skip(f"mode {mode}: {why}")


@pytest.fixture(params=SHAPED)
def shaped_mode(request: pytest.FixtureRequest) -> str:
    """Each mode with links that this machine can have."""
    need(request.param)
    return request.param


@pytest.fixture
def switch_mode() -> str:
    need("switch")
    return "switch"


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process, descriptor or device more than before; used before the cluster is made."""
    gc.collect()  # what earlier tests left in cycles must not close, or count, in the middle of this one
    before = descriptors(), children()
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while descriptors() > before[0] and time.monotonic() < deadline:  # threads of other tests may be closing
        time.sleep(0.05)
    left = descriptors(), children()
    assert left[0] <= before[0]  # fewer: a child of an earlier test has ended meanwhile
    assert left[1] <= before[1]


def descriptors() -> int:
    """Open namespaces, devices and process handles: what a cluster is made of.

    Pipes and sockets are not counted: those of other tests in this process come and go, and those of a
    cluster end with its processes, which `children` sees.
    """
    kinds = ("net:", "user:", "mnt:", "pid:", "/dev/net/", "anon_inode:[pidfd]")
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found += str(path.readlink()).startswith(kinds)
    return found


def children() -> set[int]:
    """The processes whose parent is this one, also those that ended and were not waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


@pytest.fixture
def shape_mode() -> str:
    need("shape")
    return "shape"


@pytest.fixture
def bandwidth_mode() -> str:
    need("bandwidth")
    return "bandwidth"
