"""A fixed set of ranks and the collectives on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from flexpert.core.errors import DistributedError, InputError

from . import backend, reductions
from .fitting import check_pair, check_reducible, check_rows, rows_by_position
from .heartbeat import Heartbeat, heartbeat_of
from .parts import Parts
from .pending import Pending
from .reductions import REDUCE, ReduceName
from .timeline import active_timeline
from .traffic import Traffic

__all__ = ["Group", "Pending", "ReduceName"]


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
        receive = rows_by_position("output", output, output_splits, self.size)
        send = rows_by_position("input", input, input_splits, self.size)
        check_pair("all_to_all", output, input)
        if send[self.rank] != receive[self.rank]:
            raise InputError(
                f"all_to_all: {send[self.rank]} rows to itself, {receive[self.rank]} from itself"
            )
        pending = self.exchange(output, input, Parts(send, receive), chunk)
        if not async_op:
            pending.wait()
        return pending

    def exchange(
        self,
        output: Tensor,
        input: Tensor,  # noqa: A002 - as above
        parts: Parts,
        chunk: int | None = None,
    ) -> Pending:
        """`all_to_all` with `async_op`, of tensors and parts that are known to fit.

        Raises:
            DistributedError: the collective could not be started.
        """
        source = (input.detach() if input.requires_grad else input).contiguous()
        row_bytes = source.nbytes // max(parts.leaving, 1)
        self.traffic.add_rows("all_to_all", parts.links(self.rank, self.node_of), row_bytes)
        return self.run(
            "all_to_all",
            (output, source),
            lambda pg: backend.start_all_to_all(pg, output, source, parts.receive, parts.send),
            True,
            chunk,
        )

    def all_gather(self, output: Tensor, input: Tensor, async_op: bool = False) -> Pending:  # noqa: A002
        """Concatenate the inputs of all ranks, of equal shapes, on the first dimension.

        Raises:
            InputError: shapes or dtypes do not fit.
            DistributedError: the collective failed.
        """
        check_pair("all_gather", output, input)
        check_rows("all_gather", output, input, self.size)
        source = input.detach().contiguous()
        self.traffic.add("all_gather", [source.nbytes] * self.size, self.rank, self.node_of)
        return self.run(
            "all_gather",
            (output, source),
            lambda pg: backend.start_all_gather(pg, output, source),
            async_op,
        )

    def reduce_scatter(self, output: Tensor, input: Tensor, async_op: bool = False) -> Pending:  # noqa: A002
        """Sum the inputs of all ranks; the i-th of `size` equal parts of the first dimension stays on rank i.

        Raises:
            InputError: shapes or dtypes do not fit.
            DistributedError: the collective failed.
        """
        check_pair("reduce_scatter", output, input)
        check_rows("reduce_scatter", input, output, self.size)
        check_reducible("reduce_scatter", input, "sum")
        return reductions.reduce_scatter(self, output, input.detach().contiguous(), async_op)

    def all_reduce(self, tensor: Tensor, op: ReduceName = "sum", async_op: bool = False) -> Pending:
        """Reduce the tensors of all ranks, in place; contiguous or not.

        Raises:
            InputError: the operation does not exist for the dtype.
            DistributedError: the collective failed.
        """
        if op not in REDUCE:
            raise InputError(f"all_reduce: op={op!r}; there are {', '.join(REDUCE)}")
        check_reducible("all_reduce", tensor, op)
        return reductions.all_reduce(self, tensor, op, async_op)

    def barrier(self) -> None:
        """Return when all ranks have called it.

        Raises:
            DistributedError: a rank is gone or too late.
        """
        nothing = torch.empty(0)
        self.run("barrier", (nothing, nothing), lambda pg: dist.barrier(group=pg, async_op=True), False)

    def run(
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
                backend.call_when_done(work, end)
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
