"""The share of a layer's time that is not its experts': router, dispatch and combine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from .implementations import DECODE

WHOLE = "flexpert layer"
EXPERTS = {True: "flexpert", False: "flexpert rows"}  # by whether it is decode


def routing_percent(times: Mapping[str, Sequence[float]], mode: str) -> float | None:
    """Percent of the layer's time, from repetitions in turns; None where it or its experts were not measured.

    Turn by turn, so that a machine that slows down for a while does so for both.
    """
    experts = EXPERTS[mode == DECODE]
    if WHOLE not in times or experts not in times:
        return None
    ratios = [own / whole for own, whole in zip(times[experts], times[WHOLE], strict=False)]
    return round(100 * (1 - statistics.median(ratios)), 1)
