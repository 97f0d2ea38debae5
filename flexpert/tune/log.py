"""The plan of every step, as lines of JSON in a run's folder, and their replay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan

Plans = dict[str, ExecutionPlan]  # by layer

_LINES = 50  # that are kept back at most, so that a step does not wait for the disk


class PlanLog:
    """Writes lines such as {"step": 7, "plans": {"r=1 degree=2 linear ragged none": ["blocks.1"]}}.

    Args:
        path: of the file; lines are added to what is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lines: list[str] = []

    def write(self, step: int, plans: Mapping[str, ExecutionPlan], trial: bool) -> None:
        """Note the plans of a step, and whether one of them is tried out."""
        by_plan: dict[str, list[str]] = {}
        for name, plan in plans.items():
            by_plan.setdefault(_text(plan), []).append(name)
        line = {"step": step, "plans": by_plan, **({"trial": True} if trial else {})}
        self._lines.append(json.dumps(line))
        if len(self._lines) >= _LINES:
            self.flush()

    def flush(self) -> None:
        """Write what was kept back."""
        if self._lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(self._lines) + "\n")
            self._lines.clear()

    def rewind(self, step: int) -> dict[int, Plans]:
        """Cut the file before the first line of `step` or later; the plans of the lines cut off, by step.

        A last line that is not whole, as a killed run leaves it, is dropped.

        Raises:
            ConfigError: any other line cannot be read.
        """
        if not self.path.exists():
            return {}
        kept, cut = [], {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
                plans = {name: _plan(text) for text, names in found["plans"].items() for name in names}
                place = int(found["step"])
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                if number == len(lines):
                    break
                raise ConfigError(
                    f"{self.path}, line {number}: no plans of a step ({error}); move the file away, and the "
                    f"run goes on without repeating them"
                ) from error
            if place < step:
                kept.append(line)
            else:
                cut[place] = plans
        fresh = self.path.with_name(f"{self.path.name}.tmp")
        fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        fresh.replace(self.path)
        return cut


def count_steps(path: Path) -> tuple[int, int]:
    """Steps in a log, and those of them that tried a plan; (0, 0) without a log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0, 0
    return len(lines), sum('"trial": true' in line for line in lines)


def _text(plan: ExecutionPlan) -> str:
    kernel = "" if plan.kernel == "auto" else f" {plan.kernel}"
    return f"r={plan.r} degree={plan.degree} {plan.algorithm} {plan.capacity} {plan.codec}{kernel}"


def _plan(text: str) -> ExecutionPlan:
    r, degree, algorithm, capacity, codec, *kernel = text.split()
    return ExecutionPlan(
        r=int(r.removeprefix("r=")),
        degree=int(degree.removeprefix("degree=")),
        algorithm=algorithm,
        capacity=capacity,
        codec=codec,
        kernel=kernel[0] if kernel else "auto",
    )
