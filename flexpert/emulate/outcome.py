"""How a rank ended."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexpert.core.errors import DistributedError

from .environment import Place


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one rank ended.

    Attributes:
        place: rank, node and local rank.
        exit_code: 0, another status, or a negative signal.
        seconds: from the start of the job to the end of the rank.
        value: what its function returned; None after a failure.
        output: the last of what it wrote to standard output and standard error.
        ended_by_us: why its owner ended it: "timeout", or "another rank failed"; "" if it ended by itself.
    """

    place: Place
    exit_code: int
    seconds: float
    value: Any = None
    output: str = ""
    ended_by_us: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with status 0."""
        return self.exit_code == 0 and not self.ended_by_us

    def describe(self) -> str:
        """Which rank, and how it ended."""
        if self.ended_by_us:
            how = f"was ended ({self.ended_by_us})"
        elif self.exit_code < 0:
            how = f"was ended by {_signal_name(-self.exit_code)}"
        else:
            how = f"ended with status {self.exit_code}"
        return f"{self.place} {how} after {self.seconds:.1f} s"


class RanksFailed(DistributedError):  # noqa: N818 (ranks fail; the error is that they did)
    """At least one rank failed.

    Attributes:
        outcomes: of all ranks, by rank.
    """

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = list(outcomes)
        super().__init__(describe_failures(outcomes))


def describe_failures(outcomes: Sequence[Outcome]) -> str:
    """Those that failed by themselves, first ones first, with the last line of each; "" if none failed."""
    failed = [outcome for outcome in outcomes if not outcome.ok]
    own = sorted((o for o in failed if not o.ended_by_us), key=lambda o: o.seconds) or failed
    lines = [f"{len(failed)} of {len(outcomes)} ranks failed"] if failed else []
    for outcome in own[:8]:
        last = outcome.output.strip().splitlines()[-1:]
        lines.append("; ".join([outcome.describe(), *last]))
    if len(own) > 8:
        lines.append(f"and {len(own) - 8} more")
    return ". ".join(lines)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
