"""Work that ranks do together or not at all: where one fails, all raise what it raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from flexpert.core.errors import CheckpointError, ConfigError, DistributedError, InputError

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
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise DistributedError("this rank is no member of the process group it was given")

    def share(self, value: Any) -> list[Any]:
        """The values of all ranks, in order.

        Raises:
            DistributedError: a rank is gone or too late.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise DistributedError(f"a rank is gone or too late: {error}") from error
        return values

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Do work on every rank, each its own; the results of all, in order.

        Raises what `work` raised on this rank, or else on the first rank where it failed, whose number the
        message then tells.
        """
        if self.size == 1:
            return [work()]
        own: Exception | None = None
        result: Result | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            own = error
        told = self.share((result, None if own is None else _describe(own)))
        if own is not None:
            raise own
        for rank, (_, failure) in enumerate(told):
            if failure is not None:
                kind, text = failure
                raise _KINDS.get(kind, RuntimeError)(f"rank {rank}: {text}")
        return [value for value, _ in told]

    def first(self, work: Callable[[], Result]) -> Result:
        """Do work on rank 0 alone; its result, on every rank. Raises as `together`."""
        results = self.together(lambda: work() if self.rank == 0 else None)
        value: Any = results[0]
        return value  # type: ignore[no-any-return]


def _describe(error: Exception) -> tuple[str, str]:
    """The name of the kind that the other ranks raise, and the text."""
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")
    return kind, str(error) if kind != "RuntimeError" else f"{type(error).__name__}: {error}"
