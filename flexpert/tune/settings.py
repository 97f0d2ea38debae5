"""How the tuner goes about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexpert.core.errors import ConfigError

from .bucket import ROWS_PER_BUCKET
from .drift import BAND
from .limits import Limits


@dataclass(frozen=True, kw_only=True)
class TunerSettings:
    """How the tuner goes about it.

    Attributes:
        rows_per_bucket: R: rows (and capacity) of a rank per bucket.
        limits: of the search in one bucket.
        share: of all steps that may be trials of other plans than the best known one, at most.
        burst: trials that may run ahead of that share.
        band: relative change of a settled plan's time after which its bucket is tuned anew.
        deterministic: measure and try nothing: what the dictionary knows, else the model's first choice.

    Raises:
        ConfigError: a number out of range.
    """

    rows_per_bucket: int = ROWS_PER_BUCKET
    limits: Limits = field(default_factory=Limits)
    share: float = 0.2
    burst: int = 10
    band: float = BAND
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("rows_per_bucket", self.rows_per_bucket >= 1, "an integer >= 1"),
            ("share", 0 <= self.share <= 1, "a share in 0..1"),
            ("burst", self.burst >= 0, "an integer >= 0"),
            ("band", self.band > 0, "a number > 0"),
        ):
            if not valid:
                raise ConfigError(f"tuner: {name}={getattr(self, name)!r}, expected {expected}")
