"""Work that ranks do together or not at all: where one fails, all raise what it raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flexpert.core.errors import CheckpointError, ConfigError, DistributedError, InputError

from .group import Group
from .heartbeat import Heartbeat, heartbeat_of

Result = TypeVar("Result")
_KINDS = {
    kind.__name__: kind for kind in (CheckpointError, ConfigError, DistributedError, InputError, OSError)
}


class Ranks:
    """The ranks that take part in something, for control messages: slow, small, and safe against failures.

    Args:
        group: a process group that this rank is part of; None for all ranks, or for this process alone where
            no process group is initialised.

    Attributes:
        group: as given.
        rank, size: of this process in the group.
        heartbeat: one in which these ranks take part, where there is one; it names those that are lost.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        self._group: Group | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise DistributedError("this rank is no member of the process group it was given")
        if self.size > 1:
            members, everyone = dist.get_process_group_ranks(group), group or dist.group.WORLD
            name, nodes = "ranks that work together", [0] * self.size
            self._group = Group(name, members, everyone, nodes, heartbeat=heartbeat_of(members))

    @property
    def heartbeat(self) -> Heartbeat | None:  # noqa: D102 - above
        return None if self._group is None else self._group.heartbeat

    def share(self, value: Any) -> list[Any]:
        """The values of all ranks, in order. They travel as JSON: tuples arrive as lists.

        Raises:
            DistributedError: a rank is gone or too late.
            TypeError: the value is no JSON.
        """
        return [value] if self._group is None else _gather(self._group, json.dumps(value))

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Do work on every rank, each its own; the results of all, in order, sent as `share` does.

        Raises what `work` raised on this rank, or else on the first rank where it failed, whose number the
        message then tells.
        """
        if self._group is None:
            return [work()]
        own: Exception | None = None
        try:
            text = json.dumps([work(), None])
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            own, text = error, json.dumps([None, _describe(error)])
        told = _gather(self._group, text)
        if own is not None:
            raise own
        for rank, (_, failure) in enumerate(told):
            if failure is not None:
                kind, text = failure
                raise _KINDS.get(kind, RuntimeError)(f"rank {rank}: {text}")
        return [value for value, _ in told]

    def first(self, work: Callable[[], Result]) -> Result:
        """Do work on rank 0 alone; its result, on every rank. Raises as `together`."""
        results: list[Any] = self.together(lambda: work() if self.rank == 0 else None)
        value: Result = results[0]
        return value


def _gather(group: Group, text: str) -> list[Any]:
    """What the texts of all ranks mean: their lengths travel first, then all of them in equal buffers."""
    content = bytearray(text.encode())
    device = torch.device(dist.distributed_c10d._get_object_coll_device(group.process_group))
    own = torch.tensor([len(content)], device=device)
    lengths = own.new_empty(group.size)
    group.all_gather(lengths, own)
    buffer = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=device)
    buffer[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)
    table = buffer.new_empty(group.size * len(buffer))
    group.all_gather(table, buffer)
    rows = table.cpu().view(group.size, -1).numpy()
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths.tolist(), strict=True)]


def _describe(error: Exception) -> tuple[str, str]:
    """The name of the kind that the other ranks raise, and the text."""
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")
    return kind, str(error) if kind != "RuntimeError" else f"{type(error).__name__}: {error}"
