"""What a machine can do, as numbers: rates, links, and the costs of each call. Plain data."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexpert.core.errors import ConfigError

from .fields import check_keys, check_numbers, is_number, read

FORMAT = 1  # of `Machine.to_dict`


@dataclass(frozen=True, kw_only=True)
class Link:
    """One class of links.

    Attributes:
        latency: seconds, one way.
        bandwidth: bytes per second and direction: of one rank's port inside a node, of the port that all
            ranks of a node share between nodes.
        per_message: seconds of a processor for each message a rank sends.
        step: seconds of one step of a ring (all-gather, reduce-scatter, all-reduce) over this link.
        ring_bandwidth: bytes per second that rings reach on it; 0: `bandwidth`.
        concurrency: how many times the bandwidth several exchanges under way reach together; >= 1.
    """

    latency: float
    bandwidth: float
    per_message: float = 0.0
    step: float = 0.0
    ring_bandwidth: float = 0.0
    concurrency: float = 1.0

    def __post_init__(self) -> None:
        check_numbers("link", self, ("latency", "per_message", "step", "ring_bandwidth"), least=0.0)
        check_numbers("link", self, ("bandwidth",), above=0.0)
        check_numbers("link", self, ("concurrency",), least=1.0)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast the experts' products run, by rows of one expert.

    Attributes:
        rows: of one expert, ascending.
        forward: floating-point operations per second of the products at these rows, forward.
        backward: the same of the products of backward, which are twice as many.
    """

    rows: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]

    def __post_init__(self) -> None:
        rows = self.rows if isinstance(self.rows, tuple) else ()
        counts = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in rows)
        if not rows or not counts or list(rows) != sorted(set(rows)):
            raise ConfigError(f"rate: rows={self.rows!r}, expected ascending integers >= 1")
        for name in ("forward", "backward"):
            values = getattr(self, name)
            fitting = isinstance(values, tuple) and len(values) == len(rows)
            if not fitting or not all(is_number(v) and v > 0 for v in values):
                raise ConfigError(f"rate: {name}={values!r}, expected {len(rows)} numbers > 0, as of rows")

    def slower(self, factor: float) -> Rate:
        """The rates by which everything takes `factor` times as long."""
        return Rate(
            rows=self.rows,
            forward=tuple(value / factor for value in self.forward),
            backward=tuple(value / factor for value in self.backward),
        )

    def seconds(self, rows: float, flops: float, *, backward: bool = False) -> float:
        """Of so many rows of one expert: between points linear in rows, so that the weights' time counts.

        Up to the first point products take the time of that point; beyond the last its rate holds.

        Args:
            rows: >= 0; none take no time.
            flops: of one row.
            backward: which of the two.
        """
        if rows <= 0:
            return 0.0
        values = self.backward if backward else self.forward
        if rows >= self.rows[-1]:
            return rows * flops / values[-1]
        times = [n / value for n, value in zip(self.rows, values, strict=True)]
        i = bisect_left(self.rows, rows)
        if i == 0:
            return flops * times[0]
        share = (rows - self.rows[i - 1]) / (self.rows[i] - self.rows[i - 1])
        return flops * (times[i - 1] + (times[i] - times[i - 1]) * share)

    def seconds_of(self, rows: Tensor, flops: float, *, backward: bool = False) -> Tensor:
        """As `seconds`, of many numbers of rows at once: float64, of the shape of `rows`."""
        values = torch.tensor(self.backward if backward else self.forward, dtype=torch.float64)
        knots = torch.tensor(self.rows, dtype=torch.float64)
        times = knots / values
        if len(knots) == 1:
            found = times * (rows / knots).clamp(min=1.0)
        else:
            i = torch.bucketize(rows, knots).clamp(1, len(knots) - 1)
            slope = (times[i] - times[i - 1]) / (knots[i] - knots[i - 1])
            found = times[i - 1] + slope * (rows.clamp(min=float(knots[0])) - knots[i - 1])
            found = torch.where(rows > knots[-1], rows / values[-1], found)
        return flops * torch.where(rows > 0, found, 0.0)


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Seconds on one rank, alone, for what is no product and no transfer.

    Attributes:
        call, call_backward: once a pass, the first chunk included.
        chunk, chunk_backward: of each chunk of rows after the first: indices, splits, calls.
        token, token_backward: of the router, for each token.
        row, row_backward: of gathering, sorting and combining, for each byte of a row.
        cut, cut_backward: of picking rows for chunks, or for several ranks each, and putting them back, for
            each byte that is sent.
        collective: of issuing one collective and waiting for it.
        relay: of a hierarchical exchange, over its messages: sorting rows for its second phase.
    """

    call: float = 0.0
    call_backward: float = 0.0
    chunk: float = 0.0
    chunk_backward: float = 0.0
    token: float = 0.0
    token_backward: float = 0.0
    row: float = 0.0
    row_backward: float = 0.0
    cut: float = 0.0
    cut_backward: float = 0.0
    collective: float = 0.0
    relay: float = 0.0

    def __post_init__(self) -> None:
        names = tuple(f.name for f in dataclasses.fields(self))
        check_numbers("overheads", self, names, least=0.0)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The ranks' machine.

    Attributes:
        name: of it.
        inside, between: links of a node, and between nodes.
        rates: by dtype ("float32"); of one rank that computes alone.
        memory_bandwidth: bytes per second of one rank that copies alone.
        overheads: of calls.
        processors: that all `sharing` ranks have between them; None: each rank has its own.
        sharing: ranks that share the processors.
        overlap: the share of the shorter of computation and communication that hides behind the longer where
            both go on at once; 0 to 1.
        reduce_scatter: the time of a reduce-scatter over that of an all-gather; 2 where the backend makes an
            all-reduce of it, as gloo by itself does.
        memory: bytes of one rank's device; 0: unknown.
        facts: what it was measured on, or where the numbers are from.
    """

    name: str
    inside: Link
    between: Link
    rates: Mapping[str, Rate]
    memory_bandwidth: float
    overheads: Overheads = field(default_factory=Overheads)
    processors: float | None = None
    sharing: int = 1
    overlap: float = 1.0
    reduce_scatter: float = 1.0
    memory: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_numbers("machine", self, ("memory_bandwidth",), above=0.0)
        check_numbers("machine", self, ("reduce_scatter", "sharing"), least=1.0)
        check_numbers("machine", self, ("overlap",), least=0.0)
        if self.overlap > 1:
            raise ConfigError(f"machine: overlap={self.overlap!r}, expected a number from 0 to 1")
        check_numbers("machine", self, ("memory",), least=0.0)
        if self.processors is not None:
            check_numbers("machine", self, ("processors",), above=0.0)
        if not isinstance(self.facts, Mapping):
            raise ConfigError(f"machine: facts={self.facts!r}, expected an object")
        if not self.rates:
            raise ConfigError("machine: rates={}, expected the rates of a dtype at least")

    def rate(self, dtype: str) -> Rate:
        """The rates of a dtype.

        Raises:
            ConfigError: they were not measured.
        """
        if dtype not in self.rates:
            raise ConfigError(
                f"machine {self.name!r} has no rates of {dtype} (rates: {', '.join(self.rates)}); calibrate "
                f"with this dtype"
            )
        return self.rates[dtype]

    def only(self, dtype: str) -> Machine:
        """The same machine with the rates of one dtype alone.

        Raises:
            ConfigError: they were not measured.
        """
        return dataclasses.replace(self, rates={dtype: self.rate(dtype)})

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is its inverse."""
        data = dataclasses.asdict(self)
        data["rates"] = {
            dtype: {name: list(values) for name, values in rate.items()}
            for dtype, rate in data["rates"].items()
        }
        return {"format": FORMAT, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Machine:
        """A machine from plain data.

        Raises:
            ConfigError: another format, an unknown or missing key, or a bad value; the message names it.
        """
        data = dict(data)
        if (found := data.pop("format", None)) != FORMAT:
            raise ConfigError(f"machine: format={found!r}, this version reads {FORMAT}; calibrate anew")
        check_keys("machine", cls, data)
        data["inside"] = read("machine.inside", Link, data["inside"])
        data["between"] = read("machine.between", Link, data["between"])
        data["overheads"] = read("machine.overheads", Overheads, data.get("overheads", {}))
        if not isinstance(data["rates"], Mapping):
            raise ConfigError(f"machine: rates={data['rates']!r:.60}, expected an object")
        rates = {dtype: read(f"machine.rates[{dtype}]", Rate, rate) for dtype, rate in data["rates"].items()}
        return cls(**{**data, "rates": rates})

    def to_json(self) -> str:
        """The text of a file; `from_json` is its inverse."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """A machine from the text of a file.

        Raises:
            ConfigError: no JSON, or what `from_dict` refuses.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"machine: not JSON ({error})") from error
        if not isinstance(data, dict):
            raise ConfigError(f"machine: {type(data).__name__}, expected an object")
        return cls.from_dict(data)
