"""One MoE layer's call on the clocks: it computes and sends in the order of `flexpert.parallel.pipeline`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property

import torch

from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.predict import Part, Transfer, averaging_group, gathering_group
from flexpert.tune import LayerShape, Workload
from flexpert.tune.cost import rank_bytes, transfers_of_plan
from flexpert.tune.volumes import computed_rows
from flexpert.tune.workload import DTYPES

from .clocks import Arrival, Clocks, Stage
from .durations import Durations


class LayerCall:
    """What one layer does under a plan, ready to be put on the clocks any number of times.

    Args:
        durations: of the cluster.
        shape: the layer on its ranks.
        plan: of the call.
        workload: its rows.
    """

    def __init__(
        self, durations: Durations, shape: LayerShape, plan: ExecutionPlan, workload: Workload
    ) -> None:
        self.durations, self.shape, self.plan = durations, shape, plan
        self.machine = durations.machine
        transfers = transfers_of_plan(shape, plan, workload, backward=True)
        self.rows: dict[tuple[str, bool], Transfer] = {
            (t.name, t.backward): t for t in transfers if t.name in ("dispatch", "combine")
        }
        self.bytes_W = rank_bytes(transfers)
        self.counts = [t for t in transfers if t.name == "counts"]
        self.rows_PC = computed_rows(shape, plan, workload)
        self.tokens = workload.tokens
        size = DTYPES[shape.dtype].itemsize
        self.row_bytes = float(workload.rows_PE[0].sum()) * shape.model_dim * size
        self.chunks = plan.degree if plan.r else 1

    def forward(self, clocks: Clocks) -> None:
        """The router, counts, parameters, and the pipeline of dispatch, experts and combine."""
        overheads = self.machine.overheads
        clocks.compute("calls", self.durations.flat(overheads.call))
        clocks.compute("router", self.durations.flat(overheads.token * self.tokens))
        for transfer in self.counts:
            clocks.wait(clocks.send("counts", self._exchange(transfer, transfer, "linear", 1.0)))
        self.gather(clocks)
        self._pipeline(clocks, backward=False)

    def backward(self, clocks: Clocks) -> None:
        """The same in reverse, then the gradients of gathered parameters."""
        overheads = self.machine.overheads
        clocks.compute("calls", self.durations.flat(overheads.call_backward))
        clocks.compute("router", self.durations.flat(overheads.token_backward * self.tokens))
        self._pipeline(clocks, backward=True)
        self.scatter(clocks)

    def gather(self, clocks: Clocks) -> None:
        """All-gather the parameters that the plan computes with."""
        for stage in self._gathers:
            clocks.wait(clocks.send("gather", [stage]))

    def scatter(self, clocks: Clocks) -> None:
        """Reduce-scatter the gradients of what was gathered."""
        for stage in self._scatters:
            clocks.wait(clocks.send("scatter", [stage]))

    def average(self, clocks: Clocks) -> list[Arrival]:
        """Begin to average the gradients over the ranks with copies, once a step."""
        return [clocks.send("average", [stage], link="side") for stage in self._averages]

    def _pipeline(self, clocks: Clocks, backward: bool) -> None:
        """All chunks set out; each is computed when it is there, and sent back when it is computed."""
        durations, overheads = self.durations, self.machine.overheads
        each = overheads.row_backward if backward else overheads.row
        if self.plan.r > 1 or (self.plan.r == 1 and self.chunks > 1):  # rows are picked one by one
            each += self.plan.r * (overheads.cut_backward if backward else overheads.cut)
        copies = (
            durations.flat(each * self.row_bytes) / 2
        )  # half of it on the way there, half on the way back
        clocks.compute("encode", copies)
        if self.plan.r == 0:
            clocks.compute("experts", self._experts(backward))
            clocks.compute("decode", copies)
            return
        out, home = self._exchanges(backward)
        sent, returning, chunks = [], [], range(self.chunks)
        for chunk in chunks:
            if chunk:
                issue = overheads.chunk_backward if backward else overheads.chunk
                clocks.compute("chunks", durations.flat(issue), chunk=chunk)
            self._issue(clocks, chunk)
            sent.append(clocks.send("dispatch", out, chunk=chunk))
        interference = 2 - self.machine.overlap if self.chunks > 1 else 1.0
        seconds_W = self._experts(backward)
        for chunk in chunks:
            clocks.wait(sent[chunk])
            clocks.compute("experts", seconds_W, chunk=chunk, interference=interference)
            self._issue(clocks, chunk)
            returning.append(clocks.send("combine", home, chunk=chunk))
        for chunk in chunks:
            clocks.wait(returning[chunk])
        clocks.compute("decode", copies)

    def _issue(self, clocks: Clocks, chunk: int) -> None:
        """What an exchange's messages take of a processor that ranks share: nothing is computed meanwhile."""
        seconds = self.durations.sending(self.shape, self.plan.algorithm)
        if seconds:
            clocks.compute("messages", seconds, chunk=chunk)

    @cache  # noqa: B019 - of one simulated step; it goes with the call
    def _experts(self, backward: bool) -> torch.Tensor:
        """(W,): seconds of one chunk."""
        return self.durations.experts(self.shape, self.rows_PC, self.plan, backward, 1 / self.chunks)

    @cache  # noqa: B019 - as above
    def _exchanges(self, backward: bool) -> tuple[list[Stage], list[Stage]]:
        """One chunk's way there, and back."""
        there, back = self.rows["dispatch", backward], self.rows["combine", backward]
        # Several exchanges under way fill a link better than one.
        concurrency = self.machine.between.concurrency if self.chunks > 1 else 1.0
        fraction, algorithm = 1 / self.chunks / concurrency, self.plan.algorithm
        return (
            self._exchange(there, back, algorithm, fraction),
            self._exchange(back, there, algorithm, fraction),
        )

    def _exchange(self, there: Transfer, back: Transfer, algorithm: str, fraction: float) -> list[Stage]:
        return self.durations.exchange(self.shape, there, back, algorithm, fraction)

    @cached_property
    def _gathers(self) -> list[Stage]:
        size = DTYPES[self.shape.dtype].itemsize
        return [
            self.durations.all_gather(part.numel * size * members, group_W)
            for part, group_W, members in self._gathered()
        ]

    @cached_property
    def _scatters(self) -> list[Stage]:
        return [
            self.durations.reduce_scatter(part.numel * part.itemsize * members, group_W)
            for part, group_W, members in self._gathered()
        ]

    def _gathered(self) -> list[tuple[Part, torch.Tensor, int]]:
        """Parts that are gathered, by whom, and by how many."""
        return _groups(self.shape, lambda part: gathering_group(self.shape.grid, part, self.plan.r))

    @cached_property
    def _averages(self) -> list[Stage]:
        return [
            self.durations.all_reduce(part.numel * part.itemsize, group_W)
            for part, group_W, _ in _groups(self.shape, lambda part: averaging_group(self.shape.grid, part))
        ]


def _groups(
    shape: LayerShape, group_of: Callable[[Part], torch.Tensor]
) -> list[tuple[Part, torch.Tensor, int]]:
    """Parts with groups of more than one rank; the groups are of equal size."""
    found = []
    for part in shape.parts:
        group_W = group_of(part)
        members = int((group_W == group_W[0]).sum())
        if members > 1:
            found.append((part, group_W, members))
    return found
