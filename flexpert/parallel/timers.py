"""Which rank is slow, in which phase, and why: timers of each rank, compared over the ranks.

    with time_phases(model, optimizer) as timers:
        for batch in batches:
            step(batch)
    report = straggler_report(timers, mesh)  # all ranks
    print(report.line)

Ranks in step wait for the slowest one, so a step takes equally long on all. What tells them apart is the time
in which they do not wait. On CUDA, where kernels run behind the host, use PyTorch's profiler.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexpert.core.errors import InputError

from .group import Group
from .mesh import ExpertMesh

BUSY = ("route", "experts", "dense", "optimiser")
WAITS = ("dispatch wait", "combine wait", "reduce wait")
PHASES = (*BUSY, *WAITS)

clock = time.perf_counter


@dataclass
class PhaseTimers:
    """Seconds of this rank in each of `PHASES`, forward and backward, and the rows its experts computed.

    "dispatch wait" has the exchange of counts in it, where ranks wait for one that is late; "reduce wait" the
    differentiable sums over ranks, of losses, and the collectives of DDP and FSDP; "dense" is what no other
    phase is: with r = 0 the experts' backward too. Of a phase inside another the time counts for the inner
    one.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    rows: int = 0
    _since: float = field(default_factory=lambda: clock())  # noqa: PLW0108 - tests put another clock there
    _nested: float = 0.0  # in phases that ended inside the one that runs

    def enter(self) -> tuple[float, float]:
        """Begin a phase; `leave` takes the result."""
        return clock(), self._nested

    def leave(self, name: str, entered: tuple[float, float]) -> None:
        """End a phase: its time, without that of phases inside, is added up."""
        begin, nested = entered
        total = clock() - begin
        self.seconds[name] += total - (self._nested - nested)
        self._nested = nested + total

    def finish(self) -> None:
        """Count what was in no other phase as "dense"."""
        self.seconds["dense"] = max(clock() - self._since - sum(self.seconds.values()), 0.0)

    def lap(self) -> PhaseTimers:
        """What was timed until now; these timers start again from nothing."""
        self.finish()
        lap, fresh = PhaseTimers(self.seconds, self.rows), PhaseTimers()
        self.seconds, self.rows, self._since = fresh.seconds, fresh.rows, fresh._since
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing inside the `with` is timed: what one rank alone does, such as writing to disk."""
        global _active  # noqa: PLW0603 - as in `time_phases`
        begin, previous, _active = clock(), _active, None
        try:
            yield
        finally:
            _active = previous
            self._since += clock() - begin


@dataclass(frozen=True)
class StragglerReport:
    """What the ranks' timers say; the same on all ranks.

    Attributes:
        seconds: by phase, for each rank of the mesh in order.
        rows: that each rank's experts computed.
        link_seconds: of each rank for the test message over its best link; empty without a test.
        rank: global rank of the straggler; None: there is none.
        phase: where it is slow: one of `BUSY`, or "link".
        cause: "rows", "machine" or "link".
        line: all that in a sentence.
    """

    seconds: dict[str, list[float]]
    rows: list[int]
    link_seconds: list[float]
    rank: int | None
    phase: str | None
    cause: str | None
    line: str


_active: PhaseTimers | None = None


_NOT_TIMED = nullcontext()


def phase(name: str, rows: int = 0) -> AbstractContextManager[None]:
    """Count what runs inside the `with`, and rows, where timers are active."""
    return _NOT_TIMED if _active is None else _phase(_active, name, rows)


@contextmanager
def _phase(timers: PhaseTimers, name: str, rows: int) -> Iterator[None]:
    entered = timers.enter()
    try:
        yield
    finally:
        timers.leave(name, entered)
        timers.rows += rows


@contextmanager
def time_phases(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[PhaseTimers]:
    """Time this rank's phases inside the `with`. It costs some microseconds per layer and step.

    Args:
        model: whose MoE layers, laid out by `parallelize`, are timed.
        optimizer: whose steps are.
    """
    global _active  # noqa: PLW0603 - what is timed crosses all layers of the model
    timers, previous = PhaseTimers(), _active
    hooks: list[Any] = []
    for module in model.modules():
        router = getattr(module, "router", None)
        if isinstance(router, nn.Module) and hasattr(module, "transport"):
            hooks += _timed(timers, "route", router.register_forward_pre_hook, router.register_forward_hook)
    if optimizer is not None:
        before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        hooks += _timed(timers, "optimiser", before, after)
    _active = timers
    try:
        yield timers
    finally:
        _active = previous
        for hook in hooks:
            hook.remove()
        timers.finish()


def _timed(
    timers: PhaseTimers, name: str, before: Callable[..., Any], after: Callable[..., Any]
) -> list[Any]:
    entered: list[tuple[float, float]] = []

    def start(*_: Any) -> None:
        entered.append(timers.enter())

    def stop(*_: Any) -> None:
        timers.leave(name, entered.pop())

    return [before(start), after(stop)]


def straggler_report(
    timers: PhaseTimers, mesh: ExpertMesh, *, threshold: float = 1.5, link_bytes: int = 0
) -> StragglerReport:
    """Gather the timers of all ranks of a mesh, which all call this, and say who is slow, where and why.

    Args:
        timers: of this rank, after the `with`, or a lap of them.
        mesh: the ranks.
        threshold: how many times the median of the others counts as slow; > 1.
        link_bytes: of a message that every pair of ranks exchanges to time the links; 0: do not.

    Raises:
        InputError: a bad threshold.
        DistributedError: a rank is gone or does not call this.
    """
    if not threshold > 1:
        raise InputError(f"threshold={threshold!r}: expected a number > 1")
    everyone = _uncounted(mesh.everyone)
    link = best_link_seconds(everyone, link_bytes) if link_bytes and everyone.size > 1 else -1.0
    own = torch.tensor([*(timers.seconds[p] for p in PHASES), timers.rows, link], dtype=torch.float64)
    table = own.new_empty(everyone.size * len(own))
    everyone.all_gather(table, own)
    columns = table.view(-1, len(own)).T.tolist()
    seconds = dict(zip(PHASES, columns, strict=False))
    links = columns[-1] if link >= 0 else []
    return judge(mesh.ranks, seconds, [int(n) for n in columns[-2]], links, threshold)


def best_link_seconds(group: Group, num_bytes: int) -> float:
    """Seconds for a message both ways between this rank and the rank that it reaches fastest.

    A slow link is in all pairs of its rank and in one pair of every other: the best pair tells whose it is.
    """
    best = float("inf")
    for turn in range(group.size):
        partner = (turn - group.rank) % group.size
        splits = [num_bytes if p == partner != group.rank else 0 for p in range(group.size)]
        message = torch.zeros(sum(splits), dtype=torch.uint8)
        group.barrier()
        begin = clock()
        group.all_to_all(torch.empty_like(message), message, splits, splits)
        if partner != group.rank:
            best = min(best, clock() - begin)
    return best


def _uncounted(group: Group) -> Group:
    """The group, whose traffic does not enter the figures of a step."""
    return Group(group.name, group.ranks, group.process_group, group.node_of, heartbeat=group.heartbeat)


def judge(
    ranks: Sequence[int],
    seconds: dict[str, list[float]],
    rows: list[int],
    link_seconds: list[float],
    threshold: float,
) -> StragglerReport:
    """The report on numbers of all ranks: who works longest, against the median of the others."""
    busy = [sum(seconds[p][i] for p in BUSY) for i in range(len(ranks))]
    slow = max(range(len(ranks)), key=busy.__getitem__)
    usual = _others(busy, slow)
    found: tuple[int | None, str | None, str | None] = None, None, None
    if len(ranks) > 1 and busy[slow] > threshold * usual:
        excess = {p: seconds[p][slow] - _others(seconds[p], slow) for p in BUSY}
        where = max(excess, key=excess.__getitem__)
        begin = f"rank {ranks[slow]} is slow in {where}: {seconds[where][slow]:.3g} s, others "
        begin += f"{_others(seconds[where], slow):.3g} s; "
        explained, why = _by_rows(seconds["experts"], rows, slow, threshold)
        if where != "experts":
            explained, why = False, "rows do not enter there: a slow machine, or other work than the others'"
        found, line = (ranks[slow], where, "rows" if explained else "machine"), begin + why
    elif len(link_seconds) > 2 and max(link_seconds) > threshold * _others(
        link_seconds, slow := link_seconds.index(max(link_seconds))
    ):
        found = ranks[slow], "link", "link"
        line = (
            f"rank {ranks[slow]} has a slow link: {link_seconds[slow]:.3g} s for the test message, others "
            f"{_others(link_seconds, slow):.3g} s"
        )
    else:
        line = f"no rank works more than {threshold:g} times as long as the others"
    return StragglerReport(seconds, rows, link_seconds, *found, line)


def _by_rows(seconds: list[float], rows: list[int], slow: int, threshold: float) -> tuple[bool, str]:
    """Whether a rank's rows explain its time in experts, and the words for it."""
    per_row = [s / n for i, (s, n) in enumerate(zip(seconds, rows, strict=True)) if n and i != slow]
    more = f"{rows[slow]} rows, others {_others(rows, slow):g}"
    if not rows[slow]:
        return False, f"it has no rows at all ({more}): a slow machine"
    own = seconds[slow] / rows[slow]
    usual = statistics.median(per_row) if per_row else own
    words = f"{own * 1e6:.3g} us a row, others {usual * 1e6:.3g}"
    if own <= threshold * usual:
        return True, f"its rows explain it ({more}; {words}): balance the load"
    return False, f"its rows do not explain it ({more}; {words}): a slow machine"


def _others(values: Sequence[float], rank: int) -> float:
    rest = [value for i, value in enumerate(values) if i != rank]
    return statistics.median(rest) if rest else 0.0
