"""Checkpoints written in the background, while training goes on."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from flexpert.parallel.agree import default_timeout
from flexpert.parallel.mesh import new_group
from flexpert.parallel.together import Ranks

from .checkpoint import save_checkpoint, write_checkpoint
from .checks import JSON, check_arguments, merge_descriptions


class CheckpointSaver:
    """Saves the checkpoints of a run, on one process or, called by all of them alike, on several ranks.

    An asynchronous save copies the tensors to host memory and returns; a thread writes the copies, and what
    `save_checkpoint` promises holds. At most one save is under way: the next one waits for it. An error of a
    save is raised by the next `save`, by `wait` or at the end of the `with`, once.

    Use it in a `with`, or call `close` at the end: a process that ends without it loses no published
    checkpoint, but perhaps the last save.

    Args:
        folder: of the run's checkpoints.
        keep: number of checkpoints that stay.
        asynchronous: False: `save` returns when the checkpoint is published.
        group: the ranks that save together; None for all, or for this process where there is no process
            group. An asynchronous saver makes a gloo group of its own of these ranks, as its thread must not
            meet the collectives of training.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        asynchronous: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self._own_group: dist.ProcessGroup | None = None
        self._ranks = Ranks(group)
        if asynchronous and self._ranks.size > 1:
            members = dist.get_process_group_ranks(group or dist.group.WORLD)
            limit = default_timeout(dist.distributed_c10d._get_object_coll_device())
            self._own_group = new_group(members, limit, "gloo", "checkpoints")
            self._ranks = Ranks(self._own_group)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: Path | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON]) -> None:
        """Save as `save_checkpoint` does; the caller may change the tensors at once.

        Raises what `save_checkpoint` raises, and what the save before this one raised; nothing is saved then.
        """
        self.wait()
        if not self.asynchronous:
            self._last = save_checkpoint(
                self.folder, step, tensors, state, self.keep, group=self._ranks.group
            )
            return
        copies: dict[str, Tensor] = {}

        def prepare() -> dict[str, str]:
            described = check_arguments(step, tensors, state, self.keep)
            copies.update((name, _copy(tensor)) for name, tensor in tensors.items())
            return described

        # Together, so that no rank's thread waits for one that had no memory for its copies.
        described = merge_descriptions(self._ranks.together(prepare))
        kept = copy.deepcopy(dict(state))

        def write() -> None:
            try:
                self._last = write_checkpoint(
                    self.folder, step, copies, kept, self.keep, described=described, ranks=self._ranks
                )
            except BaseException as error:  # noqa: BLE001 - raised by `wait`
                self._error = error

        # Not a daemon: a process that ends without `close` still finishes its last checkpoint.
        self._thread = threading.Thread(target=write, name="flexpert-checkpoint")
        self._thread.start()

    def wait(self) -> Path | None:
        """Wait for the save under way; the last checkpoint that this saver has published.

        Raises what the save raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._last

    def close(self) -> None:
        """Wait, and give back the group that the saver made. Raises what the save under way raised."""
        try:
            self.wait()
        finally:
            if self._own_group is not None:
                dist.destroy_process_group(self._own_group)
                self._own_group, self._ranks = None, Ranks()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._thread is not None:  # what went wrong first is what the caller needs to see
            self._thread.join()


@torch.no_grad()
def _copy(tensor: Tensor) -> Tensor:
    """A copy in host memory of its own; a DTensor's part, still known to be one."""
    if isinstance(tensor, DTensor):
        return DTensor(_copy(tensor.to_local()), tensor._spec, requires_grad=False)
    target = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return target.copy_(tensor.detach())
