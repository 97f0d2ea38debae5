"""Collectives of the dense part, which DDP or FSDP calls: issued here, so that a failure has a name.

What they compute and when is theirs. A collective that fails is told as one of Flexpert is: operation, group,
and the lost rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from . import backend
from .calls import describe_group
from .group import Group
from .heartbeat import heartbeat_of
from .pending import Pending, named
from .timers import phase

DDP, FSDP = "dense part (DDP)", "dense part (FSDP)"  # before the operation, in messages


def name_ddp(model: Any, group: Group) -> None:
    """Let `replicate(model)` average its gradients through this group, as it does by itself: sum / size.

    To be called between `replicate` and the first forward pass.
    """
    model.register_comm_hook(_DDPAverage(group), _average)


class _DDPAverage:
    """The averages of one backward pass, in the order in which buckets became ready."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.pending: list[Pending] = []

    def start(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """Average a bucket, in place."""
        if not self.pending:
            torch.autograd.Variable._execution_engine.queue_callback(self.wait)
        buffer.div_(self.group.size)
        with named(DDP):
            pending = self.group.all_reduce(buffer, async_op=True)
        self.pending.append(pending)
        return pending.future().then(lambda _: buffer)

    def wait(self) -> None:
        """Before DDP waits, at the end of backward: what failed is raised here, on the caller's thread."""
        pending, self.pending = self.pending, []
        with named(DDP), phase("reduce wait"):
            for each in pending:
                each.wait()


# DDP reads the annotations of a hook, as objects.
def _average(state, bucket):  # type: ignore[no-untyped-def]
    return state.start(bucket.buffer())


def name_fsdp(model: nn.Module) -> None:
    """Let `fully_shard(model)` gather parameters and reduce gradients through named collectives."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_AllGather())
            module.set_custom_reduce_scatter(_ReduceScatter())


class _Fresh:
    """New buffers, as FSDP's own collectives take them."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Fresh, AllGather):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        def launch() -> Any:
            return backend.all_gather(output_tensor, input_tensor, group=group, async_op=True)

        return _issue("all_gather", launch, group, output_tensor, async_op)


class _ReduceScatter(_Fresh, ReduceScatter):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        def launch() -> Any:
            return backend.reduce_scatter(output_tensor, input_tensor, group=group, op=op, async_op=True)

        return _issue("reduce_scatter", launch, group, output_tensor, async_op)


def _issue(
    operation: str, launch: Callable[[], Any], group: dist.ProcessGroup, output: Tensor, async_op: bool
) -> dist.Work | None:
    heartbeat = heartbeat_of(dist.get_process_group_ranks(group))
    label = f"{FSDP}: {operation} on group {describe_group(group)}"
    try:
        work = launch()
    except RuntimeError as error:
        raise Pending(label, heartbeat=heartbeat).error(error) from error
    pending = Pending(label, work, keep=(output,), heartbeat=heartbeat, on_host=not output.is_cuda)
    if async_op:
        return _Named(pending)
    with phase("reduce wait"):
        pending.wait()
    return None


class _Named(dist.Work):
    """Work whose failure has a name."""

    def __init__(self, pending: Pending) -> None:
        super().__init__()
        self._pending = pending

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until the result is there; `timeout` is that of the group."""
        self._pending.wait()
        return True
