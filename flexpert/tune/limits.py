"""How far a search among plans may go."""

from __future__ import annotations

from dataclasses import dataclass

from flexpert.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a search may go.

    Attributes:
        trials: measurements of other plans than the leader.
        worst: plans predicted to take more than that many times the best prediction are never run.
        near: of plans with the best r, those predicted within that factor of the best of them are tried.
        pool: at most so many of them.
        noise: relative error of one measurement that is assumed at least.
        confidence: standard errors that two plans must be apart to be told apart.

    Raises:
        ConfigError: a number out of range.
    """

    trials: int = 20
    worst: float = 2.0
    near: float = 1.3
    pool: int = 6
    noise: float = 0.03
    confidence: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("trials", 0), ("worst", 1), ("near", 1), ("pool", 1), ("noise", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"limits: {name}={getattr(self, name)!r}, expected a number >= {least}")
        if not self.confidence > 0:
            raise ConfigError(f"limits: confidence={self.confidence!r}, expected a number > 0")
