"""Noticing that a settled plan takes another time than it did."""

from __future__ import annotations

import math
import statistics

BASE, WINDOW = 8, 5  # measurements that make the band, and whose median must lie in it
BAND = 0.25  # relative change of the time that is one


class Drift:
    """Watches the time of one plan.

    Args:
        noise: relative error of one measurement.
        band: relative change of the median that counts at least; more, where 4 times the noise is more.
    """

    def __init__(self, noise: float, band: float) -> None:
        self._band = max(math.log1p(band), 4 * noise)
        self._context: int | None = None
        self._base: list[float] = []
        self._window: list[float] = []

    def add(self, seconds: float, context: int) -> bool:
        """Add a measurement; whether the last ones have left the band of the first ones of the context."""
        if context != self._context:
            self._context, self._base, self._window = context, [], []
        value = math.log(seconds)
        if len(self._base) < BASE:
            self._base.append(value)
            return False
        self._window = [*self._window, value][-WINDOW:]
        change = statistics.median(self._window) - statistics.median(self._base)
        return len(self._window) == WINDOW and abs(change) > self._band
