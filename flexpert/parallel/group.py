"""A fixed set of ranks and the collectives on it: the only place that calls those of torch.distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist

from flexpert.core.errors import DistributedError, InputError

from .heartbeat import Heartbeat, heartbeat_of
from .pending import Pending
from .timeline import active_timeline
from .traffic import Traffic

__all__ = ["Group", "Pending", "ReduceName"]

ReduceName = Literal["sum", "max", "min", "avg"]
REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "avg": dist.ReduceOp.AVG,
}
_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda parts: parts.sum(0, dtype=parts.dtype),
    "max": lambda parts: parts.amax(0),
    "min": lambda parts: parts.amin(0),
    "avg": lambda parts: parts.mean(0),
}
SMALL_REDUCE = 4096  # bytes up to which the number of steps decides
# PyTorch renames these; the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ASYNC = dist.AllToAllOptions()
_ASYNC.asyncOp = True


class Group:
    """A fixed set of ranks and the collectives on it.

    Tensors may have any numeric dtype or bool; float8 moves as bytes and is not reduced. Inputs need not be
    contiguous, outputs must be. Nothing is recorded for autograd: see `all_to_all.py` for that. All ranks of
    the group must call the same collectives in the same order.

    Attributes:
        name: for messages, such as "expert parallel".
        ranks: global ranks in order of position.
        rank: position of this process.
        size: number of ranks.
        node_of: the node of each position.
        process_group: of torch.distributed; None for a group of one, whose collectives are local copies.
        traffic: counters of what this rank has sent.
        heartbeat: tells lost ranks when a collective fails; None: one of another mesh that knows these ranks,
            or nobody.

    Raises:
        DistributedError: the process group is of other ranks, or this process is none of them.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        process_group: dist.ProcessGroup | None,
        node_of: Sequence[int],
        traffic: Traffic | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.node_of = tuple(node_of)
        self.process_group = process_group
        self.traffic = Traffic() if traffic is None else traffic
        self.heartbeat = heartbeat
        if len(self.node_of) != self.size:
            raise DistributedError(f"group {name!r}: {len(self.node_of)} nodes given for {self.size} ranks")
        self.rank = 0
        if self.size == 1:
            self._where = f"group {name!r} (ranks {self.ranks}, this is {self.ranks[0]})"
            self.process_group = None
            return
        if process_group is None:
            raise DistributedError(f"group {name!r} of ranks {self.ranks} needs a process group")
        if not isinstance(process_group, dist.ProcessGroup):
            raise DistributedError(f"group {name!r}: this process is none of the ranks {self.ranks}")
        actual = tuple(dist.get_process_group_ranks(process_group))
        if actual != self.ranks:
            raise DistributedError(
                f"group {name!r}: ranks {self.ranks} given with a process group of {actual}"
            )
        self.rank = process_group.rank()
        self._where = f"group {name!r} (ranks {self.ranks}, this is {self.ranks[self.rank]})"

    def __repr__(self) -> str:
        return f"Group({self.name!r}, ranks={self.ranks}, rank={self.rank})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Itself: a copied model communicates over the same ranks."""
        return self

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,  # noqa: A002 - as torch.distributed calls it
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        async_op: bool = False,
        *,
        chunk: int | None = None,
    ) -> Pending:
        """Send a part of `input` to each position, and receive one from each, in order of position.

        Args:
            output: (M, ...), written; M = sum of `output_splits`.
            input: (N, ...), N = sum of `input_splits`.
            output_splits: rows from each position; None for equal parts.
            input_splits: rows to each position; None for equal parts.
            async_op: return at once; the result is there after `wait()`.
            chunk: of a pipeline, for the timeline.

        Raises:
            InputError: sizes, splits or dtypes do not fit.
            DistributedError: the collective failed.
        """
        receive = self._splits("output", output, output_splits)
        send = self._splits("input", input, input_splits)
        self._check("all_to_all", output, input)
        if send[self.rank] != receive[self.rank]:
            raise InputError(
                f"all_to_all: {send[self.rank]} rows to itself, {receive[self.rank]} from itself"
            )
        pending = self.exchange(output, input, receive, send, chunk)
        if not async_op:
            pending.wait()
        return pending

    def exchange(
        self,
        output: Tensor,
        input: Tensor,  # noqa: A002 - as above
        receive: list[int],
        send: list[int],
        chunk: int | None = None,
    ) -> Pending:
        """`all_to_all` with `async_op`, of tensors and splits that are known to fit.

        Raises:
            DistributedError: the collective could not be started.
        """
        source = input.detach().contiguous()
        row = source.element_size() * _row_size(source)
        self.traffic.add("all_to_all", [rows * row for rows in send], self.rank, self.node_of)
        return self._run(
            "all_to_all",
            (output, source),
            lambda pg: _start_all_to_all(pg, _bytes(output), _bytes(source), receive, send),
            True,
            chunk,
        )

    def all_gather(self, output: Tensor, input: Tensor, async_op: bool = False) -> Pending:  # noqa: A002
        """Concatenate the inputs of all ranks, of equal shapes, on the first dimension.

        Raises:
            InputError: shapes or dtypes do not fit.
            DistributedError: the collective failed.
        """
        self._check("all_gather", output, input)
        self._check_rows("all_gather", output, input)
        source = input.detach().contiguous()
        self.traffic.add("all_gather", [_num_bytes(source)] * self.size, self.rank, self.node_of)
        return self._run(
            "all_gather",
            (output, source),
            lambda pg: _all_gather(_bytes(output), _bytes(source), group=pg, async_op=True),
            async_op,
        )

    def reduce_scatter(self, output: Tensor, input: Tensor, async_op: bool = False) -> Pending:  # noqa: A002
        """Sum the inputs of all ranks; the i-th of `size` equal parts of the first dimension stays on rank i.

        Raises:
            InputError: shapes or dtypes do not fit.
            DistributedError: the collective failed.
        """
        self._check("reduce_scatter", output, input)
        self._check_rows("reduce_scatter", input, output)
        _check_reducible("reduce_scatter", input, "sum")
        source = input.detach().contiguous()
        self.traffic.add("reduce_scatter", [_num_bytes(output)] * self.size, self.rank, self.node_of)
        if not source.is_cpu:
            return self._run(
                "reduce_scatter",
                (output, source),
                lambda pg: _reduce_scatter(output, source, group=pg, async_op=True),
                async_op,
            )
        # Gloo reduces everything on every rank, in twice the bytes, and cuts the result.
        parts = torch.empty_like(source)
        even = [output.shape[0]] * self.size

        def add() -> None:
            torch.sum(parts.view(self.size, *output.shape), 0, dtype=output.dtype, out=output.detach())

        return self._run(
            "reduce_scatter",
            (parts, source),
            lambda pg: _start_all_to_all(pg, parts, source, even, even),
            async_op,
            finish=add,
        )

    def all_reduce(self, tensor: Tensor, op: ReduceName = "sum", async_op: bool = False) -> Pending:
        """Reduce the tensors of all ranks, in place; contiguous or not.

        Raises:
            InputError: the operation does not exist for the dtype.
            DistributedError: the collective failed.
        """
        if op not in REDUCE:
            raise InputError(f"all_reduce: op={op!r}; there are {', '.join(REDUCE)}")
        _check_reducible("all_reduce", tensor, op)
        target = tensor.detach()
        buffer = target.contiguous()
        edges = [buffer.numel() * p // self.size for p in range(self.size + 1)]
        portions = [(stop - start) * buffer.element_size() for start, stop in pairwise(edges)]
        self.traffic.add("all_reduce", portions, self.rank, self.node_of)
        self.traffic.add("all_reduce", [portions[self.rank]] * self.size, self.rank, self.node_of)
        if buffer.is_cpu and _num_bytes(buffer) <= SMALL_REDUCE:
            return self._reduce_at_once(target, buffer, op, async_op)
        finish = None if buffer.data_ptr() == target.data_ptr() else lambda: target.copy_(buffer)
        return self._run(
            "all_reduce",
            (buffer, buffer),
            lambda pg: dist.all_reduce(buffer, REDUCE[op], group=pg, async_op=True),
            async_op,
            finish=finish,
        )

    def _reduce_at_once(self, target: Tensor, source: Tensor, op: ReduceName, async_op: bool) -> Pending:
        """Every rank sends its few numbers to every other: one step, where gloo's ring takes 2 (n - 1)."""
        own = source.reshape(1, -1).expand(self.size, -1).contiguous()
        parts, even = torch.empty_like(own), [1] * self.size

        def reduce() -> None:
            target.copy_(_REDUCED[op](parts).view(target.shape))

        return self._run(
            "all_reduce",
            (parts, own),
            lambda pg: _start_all_to_all(pg, parts, own, even, even),
            async_op,
            finish=reduce,
        )

    def barrier(self) -> None:
        """Return when all ranks have called it.

        Raises:
            DistributedError: a rank is gone or too late.
        """
        nothing = torch.empty(0)
        self._run("barrier", (nothing, nothing), lambda pg: dist.barrier(group=pg, async_op=True), False)

    def _run(
        self,
        operation: str,
        buffers: tuple[Tensor, Tensor],
        launch: Callable[[dist.ProcessGroup], dist.Work | None],
        async_op: bool,
        chunk: int | None = None,
        *,
        finish: Callable[[], object] | None = None,
    ) -> Pending:
        """Launch a collective from `buffers[1]` to `buffers[0]`, or copy in a group of one."""
        output, source = buffers
        label = f"{operation} on {self._where}"
        heartbeat = self.heartbeat or heartbeat_of(self.ranks)
        timeline = active_timeline()
        work, end = None, None
        if timeline is not None:
            end = timeline.begin(f"{operation} {self.name}", "communication", chunk)
        if self.process_group is None:
            if output is not source:
                output.detach().copy_(source.view_as(output))
        else:
            try:
                work = launch(self.process_group)
            except RuntimeError as error:
                raise Pending(label, heartbeat=heartbeat).error(error) from error
            if end is not None and work is not None and not output.is_cuda:
                _call_when_done(work, end)
        pending = Pending(
            label,
            work,
            keep=buffers,
            finish=finish,
            end=end,
            heartbeat=heartbeat,
            on_host=not output.is_cuda,
        )
        if not async_op or work is None:
            pending.wait()
        return pending

    def _splits(self, side: str, tensor: Tensor, splits: Sequence[int] | None) -> list[int]:
        """Rows per position, checked."""
        rows = tensor.shape[0] if tensor.dim() else 0
        if splits is None:
            if rows % self.size:
                raise InputError(
                    f"all_to_all: {rows} rows of {side} for {self.size} ranks; pass {side}_splits"
                )
            return [rows // self.size] * self.size
        splits = list(splits)
        if len(splits) != self.size or sum(splits) != rows:
            raise InputError(
                f"all_to_all: {side}_splits={splits} for {self.size} ranks and {rows} rows of {side}"
            )
        return splits

    def _check_rows(self, operation: str, large: Tensor, small: Tensor) -> None:
        if small.dim() == 0 or large.shape != (self.size * small.shape[0], *small.shape[1:]):
            raise InputError(
                f"{operation}: {self.size} times {tuple(small.shape)} on the first dimension expected, "
                f"got {tuple(large.shape)}"
            )

    def _check(self, operation: str, output: Tensor, source: Tensor) -> None:
        if output.dtype != source.dtype or output.device != source.device:
            raise InputError(
                f"{operation}: output is {output.dtype} on {output.device}, input {source.dtype} "
                f"on {source.device}"
            )
        if output.shape[1:] != source.shape[1:]:
            raise InputError(
                f"{operation}: output has rows {tuple(output.shape[1:])}, input {tuple(source.shape[1:])}"
            )
        if not output.is_contiguous():
            raise InputError(f"{operation}: output is written in place and must be contiguous")


def _check_reducible(operation: str, tensor: Tensor, op: ReduceName) -> None:
    if tensor.element_size() == 1 and tensor.is_floating_point():
        raise InputError(f"{operation}: {tensor.dtype} cannot be summed or compared; convert it before")
    if op == "sum" and tensor.dtype == torch.bool:  # gloo would add the bytes and leave a bool of 2
        raise InputError(f"{operation}: a sum of bools is none; use op='max', or convert to an integer dtype")
    if op == "avg" and not tensor.is_floating_point():
        raise InputError(f"{operation}: op='avg' of {tensor.dtype}; use 'sum', or convert it before")


def _start_all_to_all(
    group: dist.ProcessGroup, output: Tensor, source: Tensor, receive: list[int], send: list[int]
) -> dist.Work:
    """`dist.all_to_all_single` without its checks, which cost as much as starting it."""
    start = getattr(group, "all_to_all_single", None) or group.alltoall_base
    work: dist.Work = start(output, source, receive, send, _ASYNC)
    return work


def _bytes(tensor: Tensor) -> Tensor:
    """float8, which few backends know, as the bytes it is; others as they are."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 and tensor.is_floating_point() else tensor


def _call_when_done(work: dist.Work, function: Callable[[], None]) -> None:
    """Call from the thread that completes the work, also when it failed; never where it cannot tell."""
    try:
        future = work.get_future()
    except RuntimeError:  # a backend without them; `wait` then tells
        return
    future.add_done_callback(lambda _: function())


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _row_size(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])
