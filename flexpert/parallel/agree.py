"""Comparing what ranks are about to do before the first process group is made: through the store alone.

Ranks that disagree about groups would each wait for others that never come.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from flexpert.core.errors import DistributedError

from .bounded import bounded


def default_store() -> Store:
    """The store of the default process group."""
    store: Store = dist.distributed_c10d._get_default_store()
    return store


def default_timeout(device: str) -> timedelta:
    """That of the default process group: `new_group` would take the backend's, half an hour for gloo."""
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device(device))
    timeout: timedelta = backend.options._timeout
    return timeout


def versions() -> dict[str, str]:
    """What ranks should share besides their arguments."""
    # Not an import: rooms import downwards, and the package is above all.
    return {"torch": torch.__version__, "flexpert": importlib.import_module("flexpert").__version__}


def agree(what: str, facts: Mapping[str, Any], members: Sequence[int], timeout: timedelta) -> str:
    """Return when all members have called this with equal facts.

    Args:
        what: the function that ranks call, for messages.
        facts: what must be equal; JSON.
        members: global ranks; each calls this equally often with the same members.
        timeout: how long to wait for them.

    Returns:
        a name of this call that no other call on the store has.

    Raises:
        DistributedError: facts differ, or a member does not come.
    """

    def compare() -> str:
        call = _Call(default_store(), what, json.loads(json.dumps(dict(facts))), list(members))
        return call.run(timeout.total_seconds())

    try:
        return bounded(compare, timeout)
    except (RuntimeError, TimeoutError) as error:
        if isinstance(error, DistributedError):
            raise
        raise DistributedError(
            f"{what} on ranks {tuple(members)}: the store of the process group failed; its host, rank 0 or "
            f"torchrun's agent, may be lost, or this machine cut off from it: {error}"
        ) from error


class _Call:
    """One rank's part in one comparison. Keys of the store carry the members and how often they met."""

    def __init__(self, store: Store, what: str, facts: dict[str, Any], members: list[int]) -> None:
        self.store, self.what, self.facts, self.members = store, what, facts, members
        self.rank = dist.get_rank()
        met = f"flexpert/{what}/{'-'.join(map(str, members))}"
        self.name = f"{met}/{store.add(f'{met}/count/{self.rank}', 1)}"

    def run(self, seconds: float) -> str:
        mine = json.dumps(self.facts)
        self.store.set(f"{self.name}/{self.rank}", mine)
        self.store.set(self._now(self.rank), json.dumps([self.name, {**self.facts, "ranks": self.members}]))
        missing, pause, deadline = self.members, 0.001, time.monotonic() + seconds
        while missing := [rank for rank in missing if not self.store.check([f"{self.name}/{rank}"])]:
            self._look_elsewhere(missing, late=time.monotonic() > deadline, seconds=seconds)
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        for rank in self.members:
            self._compare(rank, json.loads(self.store.get(f"{self.name}/{rank}")))
        return self.name

    def _now(self, rank: int) -> str:
        """The key under which a rank tells its latest call."""
        return f"flexpert/{self.what}/now/{rank}"

    def _compare(self, rank: int, theirs: dict[str, Any]) -> None:
        if theirs != self.facts:
            raise DistributedError(
                f"{self.what}: rank {self.rank} and rank {rank} differ in {self._difference(theirs)}; call "
                f"it with equal arguments, under equal versions, on all ranks"
            )

    def _look_elsewhere(self, missing: Sequence[int], *, late: bool, seconds: float) -> None:
        """Raise where a missing rank waits for this one in a call with other ranks, or it is too late."""
        for rank in missing:
            if not self.store.check([self._now(rank)]):
                continue
            call, theirs = json.loads(self.store.get(self._now(rank)))
            # In calls that this rank has been in, the other one waits for it no longer.
            if self.rank in theirs["ranks"] and not self.store.check([f"{call}/{self.rank}"]):
                raise DistributedError(
                    f"{self.what}: rank {self.rank} waits for rank {rank}, which waits for it in a call with "
                    f"other arguments: {self._difference(theirs)}; call it with equal arguments on all ranks"
                )
        if late:
            named = ", ".join(map(str, missing))
            raise DistributedError(
                f"{self.what} on ranks {tuple(self.members)}: rank {named} did not call it within "
                f"{seconds:g} s"
            )

    def _difference(self, theirs: dict[str, Any]) -> str:
        mine = {**self.facts, "ranks": self.members}
        return "; ".join(
            f"{name}: {mine.get(name)!r} and {theirs[name]!r}"
            for name in theirs
            if theirs[name] != mine.get(name)
        )
