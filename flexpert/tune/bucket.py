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
_EDGES = (1.5, 3.0)  # of the busiest expert's rows over the mean


@dataclass(frozen=True, order=True, kw_only=True)
class Bucket:
    """A class of workload of one layer shape.

    Attributes:
        rows: of a rank, on average over the ranks, divided by R and rounded down.
        capacity: of a rank's buffers for all experts, likewise; -1 where the router has no capacity. With
            it come the padded plans, whose cost depends on it.
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
        ratio = max(counts) * experts / total if total else 1.0
        return cls(
            rows=total // ranks // rows_per_bucket,
            capacity=-1 if capacity is None else capacity * experts // rows_per_bucket,
            skew=sum(ratio >= edge for edge in _EDGES),
        )

    def distance(self, other: Bucket) -> float:
        """How unlike two buckets are, 0 for equal ones: the factor between their sizes counts."""
        size = abs(_level(self.rows) - _level(other.rows)) + abs(
            _level(self.capacity) - _level(other.capacity)
        )
        return size + abs(self.skew - other.skew)

    def to_dict(self) -> dict[str, int]:
        """Plain data; `from_dict` is its inverse."""
        return {"rows": self.rows, "capacity": self.capacity, "skew": self.skew}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bucket:
        """A bucket from plain data.

        Raises:
            ConfigError: an unknown key, or no integer.
        """
        check_options("bucket", data, ("rows", "capacity", "skew"))
        for name, value in data.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"bucket: {name}={value!r}, expected an integer")
        return cls(**data)

    def describe(self, rows_per_bucket: int = ROWS_PER_BUCKET) -> str:
        """In words: "256..383 rows, capacity 512..639, even"."""
        parts = [f"{_range(self.rows, rows_per_bucket)} rows"]
        if self.capacity >= 0:
            parts.append(f"capacity {_range(self.capacity, rows_per_bucket)}")
        return ", ".join([*parts, SKEWS[self.skew]])


def _range(index: int, size: int) -> str:
    return f"{index * size}..{(index + 1) * size - 1}"


def _level(index: int) -> float:
    """A logarithm that bears 0 and -1."""
    return math.log2(index + 2)
