"""What the tasks' figures have in common."""

from __future__ import annotations

import sys

from transformers.utils.logging import disable_progress_bar

from flexpert.core.stats import RoutingStats


def shares(stats: RoutingStats) -> list[float]:
    """Each expert's share of the rows."""
    return (stats.load_E / stats.load_E.sum().clamp(min=1)).tolist()


def drop_rate(dropped: float, selected: float) -> dict[str, float]:
    """The share of assignments dropped, under its name; nothing without any assignment."""
    return {"drop_rate": dropped / selected} if selected else {}


def quieten_transformers() -> None:
    """Its progress bars are for terminals."""
    if not sys.stderr.isatty():
        disable_progress_bar()
