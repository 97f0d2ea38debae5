"""Noticing that a settled plan takes another time than it did."""

from __future__ import annotations

import math
import statistics

from .standing import noise_of

BAND = 0.25  # relative change of the time that is one
BASE = 12  # measurements that tell the usual time and make the band
_LIMIT, _MOST = 1.0, 0.4  # of the sums, and what one measurement, that may be a stall, can add


class Drift:
    """Watches the time of one plan, by cumulative sums (Page, Biometrika 1954).

    What a logarithm of a time lies beyond the band adds up, what it lies within it is taken off, for longer
    and for shorter times: so thrice the time is noticed after three steps, and half as long again after six.

    Args:
        band: relative change that counts at least; more, where 4 times the noise is more.
    """

    def __init__(self, band: float) -> None:
        self._least = math.log1p(band)
        self._context: int | None = None
        self._base: list[float] = []
        self._sums = 0.0, 0.0

    @property
    def uneasy(self) -> bool:
        """Whether the last times lay beyond the band."""
        return max(self._sums) > 0

    def add(self, seconds: float, context: int) -> bool:
        """Add a measurement; whether the times have left the band of the first ones of the context."""
        if context != self._context:
            self._context, self._base, self._sums = context, [], (0.0, 0.0)
        value = math.log(seconds)
        if len(self._base) < BASE:
            self._base.append(value)
            return False
        usual = statistics.median(self._base)
        band = max(self._least, 4 * noise_of([abs(value - usual) for value in self._base]))
        longer, shorter = self._sums
        change = value - usual
        self._sums = _grown(longer, change - band), _grown(shorter, -change - band)
        return max(self._sums) > _LIMIT


def _grown(total: float, by: float) -> float:
    return max(total + min(by, _MOST), 0.0)
