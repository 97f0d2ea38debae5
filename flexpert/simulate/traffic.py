"""Which experts the tokens of a step go to: drawn from a distribution, or as a run recorded it.

    uniform                                        equal numbers, exactly
    zipf:skew=1.0,seed=3                           the i-th busiest expert has i^-skew times the busiest's
    zipf:skew=1.0,drift=0.1,correlation=0.8        who is busy drifts over steps, and resembles over layers
    trace:runs/moe,seed=3                          a run's folder, its metrics.jsonl, or a trace file

Letters: P ranks of a replica, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from flexpert.core.config import require_int, require_number
from flexpert.core.errors import ConfigError
from flexpert.core.registry import check_options, suggest
from flexpert.monitor.metrics import read_metrics
from flexpert.tune import LayerShape, Workload

from .describe import split_text
from .model import ExpertPart


class Traffic(Protocol):
    """Rows of a layer in a step."""

    def shares(self, layer: int, step: int, num_experts: int) -> np.ndarray | None:
        """(E,) of a layer's rows, summing to 1; None: equal for all, exactly."""
        ...

    @property
    def seed(self) -> int:
        """Of what is drawn."""
        ...


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Busy and idle experts by Zipf's law, which drift over steps and resemble each other over layers.

    Attributes:
        skew: exponent; None: equal numbers for all experts, exactly. 0 is equal in expectation.
        drift: 0: who is busy stays so; 1: it is drawn anew at each step; between: a stationary random walk.
        correlation: 0: layers have nothing in common; 1: the same experts are busy in all.
        seed: of what is drawn.
    """

    skew: float | None = None
    drift: float = 0.0
    correlation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.skew is not None:
            require_number("traffic: skew", self.skew, least=0)
        for name in ("drift", "correlation"):
            value = getattr(self, name)
            require_number(f"traffic: {name}", value, least=0)
            if value > 1:
                raise ConfigError(f"traffic: {name}={value!r}, expected a number in 0..1")
        require_int("traffic: seed", self.seed, least=0)

    def shares(self, layer: int, step: int, num_experts: int) -> np.ndarray | None:
        """(E,) of a layer's rows."""
        if self.skew is None:
            return None
        order = np.argsort(np.argsort(-self._popularity(layer, step, num_experts), kind="stable"))
        weights = (1.0 + order) ** -self.skew
        return weights / weights.sum()

    def _popularity(self, layer: int, step: int, num_experts: int) -> np.ndarray:
        """(E,) standard normal: what all layers have in common, and what is the layer's own."""
        common = self._walk(0, step, num_experts)
        own = self._walk(1 + layer, step, num_experts)
        return math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * own

    def _walk(self, stream: int, step: int, num_experts: int) -> np.ndarray:
        value = self._normal(stream, 0, num_experts)
        for now in range(1, step + 1) if self.drift else ():
            noise = self._normal(stream, now, num_experts)
            value = math.sqrt(1 - self.drift) * value + math.sqrt(self.drift) * noise
        return value

    def _normal(self, stream: int, step: int, num_experts: int) -> np.ndarray:
        return np.random.default_rng((self.seed, stream, step)).standard_normal(num_experts)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Shares that a run recorded, layer by layer; steps and layers past the end start again.

    Attributes:
        layers: name to (steps, E) shares.
        seed: of how each rank's rows are drawn from them.
    """

    layers: Mapping[str, np.ndarray] = field(repr=False)
    seed: int = 0

    def shares(self, layer: int, step: int, num_experts: int) -> np.ndarray | None:
        """(E,) of a layer's rows.

        Raises:
            ConfigError: the trace has another number of experts.
        """
        names = list(self.layers)
        name = names[layer % len(names)]
        shares_SE = self.layers[name]
        if shares_SE.shape[1] != num_experts:
            raise ConfigError(
                f"traffic: layer {name!r} of the trace has {shares_SE.shape[1]} experts, the model "
                f"{num_experts}"
            )
        return shares_SE[step % len(shares_SE)]

    @classmethod
    def load(cls, path: Path, seed: int = 0) -> Recorded:
        """The traffic of a run's folder, its metrics.jsonl, or a JSON file {"layers": {name: [[share]]}}.

        Raises:
            ConfigError: nothing recorded there, or something else; the message names it.
        """
        if path.name == "metrics.jsonl":
            path = path.parent
        if path.is_dir():
            try:
                lines = [line["load"] for line in read_metrics(path) if line.get("load")]
                raw = {name: [line[name] for line in lines if name in line] for name in lines[0]}
            except IndexError:
                raise ConfigError(f"traffic: {path} has no metrics.jsonl with the load of experts") from None
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise ConfigError(f"traffic: {path}/metrics.jsonl is damaged: {error}") from error
        else:
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))["layers"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"traffic: {path} is no trace: {error!r}") from None
        return cls.from_lists(raw, seed)

    @classmethod
    def from_lists(cls, layers: Mapping[str, Sequence[Sequence[float]]], seed: int = 0) -> Recorded:
        """Traffic of rows or shares, layer name to steps to experts.

        Raises:
            ConfigError: a layer that is no table of numbers >= 0.
        """
        found = {}
        if not isinstance(layers, Mapping) or not layers:
            raise ConfigError(f"traffic: layers={layers!r:.60}, expected a mapping with a layer at least")
        for name, steps in layers.items():
            try:
                table = np.array(steps, dtype=np.float64)
            except (TypeError, ValueError):
                table = np.zeros(0)
            if table.ndim != 2 or not table.size or not np.isfinite(table).all() or (table < 0).any():
                raise ConfigError(f"traffic: layers[{name!r}] is no table of numbers >= 0 (steps, experts)")
            sums = table.sum(1, keepdims=True)
            if not sums.all():
                raise ConfigError(f"traffic: layers[{name!r}] has a step without rows")
            found[name] = table / sums
        return cls(layers=found, seed=seed)


def parse_traffic(text: str) -> Traffic:
    """The traffic of a text.

    Raises:
        ConfigError: an unknown name or setting, or a bad value.
    """
    if text.startswith("trace:"):
        path, _, seed = text.removeprefix("trace:").partition(",seed=")
        if seed and not seed.isdecimal():
            raise ConfigError(f"traffic: seed={seed!r}, expected an integer >= 0")
        return Recorded.load(Path(path), int(seed or 0))
    name, settings = split_text(text, "traffic")
    accepted: dict[str, list[str]] = {"uniform": [], "zipf": ["skew", "drift", "correlation", "seed"]}
    if name not in accepted:
        raise ConfigError(f"traffic: unknown name {name!r}: {suggest(name, [*accepted, 'trace'])}")
    check_options(f"traffic {name!r}", settings, accepted[name])
    return Synthetic(**({"skew": 1.0, **settings} if name == "zipf" else {}))


def workload(
    traffic: Traffic, part: ExpertPart, shape: LayerShape, tokens: int, *, layer: int = 0, step: int = 0
) -> Workload:
    """The rows of one call of a layer: each rank draws its own from the layer's shares.

    Args:
        traffic: the shares.
        part: the layer's experts.
        shape: the layer on its ranks.
        tokens: of one rank.
        layer, step: which.
    """
    rows, capacity = tokens * part.top_k, part.capacity(tokens)
    shares = traffic.shares(layer, step, part.num_experts)
    if shares is None:
        even = Workload.uniform(shape, rows, tokens=tokens)
        counts_PE, most = even.rows_PE, -(-rows // part.num_experts)
    else:
        generator = np.random.default_rng((traffic.seed, 2**20 + layer, step))
        drawn: Any = generator.multinomial(rows, shares, size=shape.ranks)
        counts_PE, most = torch.from_numpy(drawn.astype(np.int64)), int(drawn.max())
    limited = part.capacity_factor is not None and part.capacity_factor != 0
    if limited and capacity is not None and capacity < most:
        counts_PE = counts_PE.clamp(max=capacity)
    fixed = capacity if part.capacity_factor is not None and part.capacity_factor > 0 else None
    return Workload(rows_PE=counts_PE, tokens=tokens, capacity=fixed)
