"""Noticing that a settled plan takes another time than it did."""

from __future__ import annotations

import math
import statistics

from .standing import noise_of

BASE, WINDOW = 12, 9  # measurements that make the band, and whose median must lie in it
BAND = 0.25  # relative change of the time that is one


class Drift:
    """Watches the time of one plan.

    Args:
        band: relative change of the median that counts at least; more, where 4 times the noise is more.
    """

    def __init__(self, band: float) -> None:
        self._least = math.log1p(band)
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
        usual = statistics.median(self._base)
        noise = noise_of([abs(value - usual) for value in self._base])
        change = abs(statistics.median(self._window) - usual)
        return len(self._window) == WINDOW and change > max(self._least, 4 * noise)
