"""Classes of workload: calls of one class are expected to have the same best plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexpert.core.errors import ConfigError
from flexpert.core.registry import check_options

ROWS_PER_BUCKET = 128  # R of Tutel (arXiv 2206.03382, section 3.3)
SKEWS = ("even", "skewed", "one-sided")
ROOM = ("tight", "roomy", "wide")
_EDGES = (1.5, 3.0)  # of the busiest expert's rows over the mean, and of buffers over rows


@dataclass(frozen=True, order=True, kw_only=True)
class Bucket:
    """A class of workload of one layer shape.

    Attributes:
        rows: of a rank, on average over the ranks, divided by R and rounded down.
        capacity: -1 where the router has none; else 0, 1 or 2 for buffers of less than 1.5 times the rows,
            less than 3 times, or more. It is what padded plans cost over ragged ones.
        skew: 0, 1 or 2 for a busiest expert with less than 1.5 times the mean of the rows, less than 3 times,
            or more; see `SKEWS`.
    """

    rows: int
    capacity: int = -1
    skew: int = 0

    @classmethod
    def of(
        cls, counts: Sequence[int], ranks: int, capacity: int | None, rows_per_bucket: int = ROWS_PER_BUCKET
    ) -> Bucket:
        """The bucket of a call.

        Args:
            counts: rows for each expert, the sum over the ranks.
            ranks: how many.
            capacity: rows of one expert's buffer on one rank; None without.
            rows_per_bucket: R.
        """
        total, experts = sum(counts), len(counts)
        busiest = max(counts) * experts / total if total else 1.0
        room = None if capacity is None else capacity * experts * ranks / max(total, 1)
        return cls(
            rows=total // ranks // rows_per_bucket,
            capacity=-1 if room is None else _class(room),
            skew=_class(busiest),
        )

    def distance(self, other: Bucket) -> float:
        """How unlike two buckets are, 0 for equal ones: the factor between their sizes counts."""
        size = abs(math.log2(self.rows + 1) - math.log2(other.rows + 1))
        return size + abs(self.skew - other.skew) + abs(self.capacity - other.capacity)

    def within_twice(self, other: Bucket) -> bool:
        """Whether neither has more than twice the rows of the other."""
        return abs(math.log2(self.rows + 1) - math.log2(other.rows + 1)) <= 1

    def to_dict(self) -> dict[str, int]:
        """Plain data; `from_dict` is its inverse."""
        return {"rows": self.rows, "capacity": self.capacity, "skew": self.skew}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bucket:
        """A bucket from plain data.

        Raises:
            ConfigError: an unknown key, or a value that cannot be.
        """
        check_options("bucket", data, ("rows", "capacity", "skew"))
        for name, value in data.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"bucket: {name}={value!r}, expected an integer")
        found = cls(**data)
        bounds = {"rows": (0, None), "capacity": (-1, len(ROOM) - 1), "skew": (0, len(SKEWS) - 1)}
        for name, (least, most) in bounds.items():
            value = getattr(found, name)
            if value < least or (most is not None and value > most):
                raise ConfigError(f"bucket: {name}={value}, expected {least}..{'' if most is None else most}")
        return found

    def describe(self, rows_per_bucket: int = ROWS_PER_BUCKET) -> str:
        """In words: "256..383 rows, even, tight buffers"."""
        parts = [f"{self.rows * rows_per_bucket}..{(self.rows + 1) * rows_per_bucket - 1} rows"]
        parts.append(SKEWS[self.skew])
        if self.capacity >= 0:
            parts.append(f"{ROOM[self.capacity]} buffers")
        return ", ".join(parts)


def _class(ratio: float) -> int:
    return sum(ratio >= edge for edge in _EDGES)
