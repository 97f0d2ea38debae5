"""The execution plan: how one call of a layer runs over the ranks, without a change of what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError
from .registry import check_options

ALGORITHMS = ("linear", "2dh")
CAPACITY_MODES = ("ragged", "padded")
CODECS = ("none", "bf16", "fp8")
KERNELS = ("auto", "native", "grouped_mm", "portable", "recompute", "separate")
MAX_DEGREE = 8
_OPTIONS = {"algorithm": ALGORITHMS, "capacity": CAPACITY_MODES, "codec": CODECS, "kernel": KERNELS}


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """How one call runs over the ranks of a mesh (Tutel, arXiv 2206.03382, sections 3.1 to 3.3).

    With S slices per expert (ranks that hold a part of one expert each):

    Attributes:
        r: 0, data parallel: every rank gathers the parameters of all experts, no token travels. 1, expert
            parallel: the S slices of an expert are gathered, its tokens are split over them. S, expert and
            tensor parallel: no parameter travels, every token reaches all slices and their results are
            summed. Divisors of S between: r-way tensor parallel, S / r-way data parallel.
        degree: chunks in which rows are exchanged, so that one chunk travels while another is computed; 1..8.
        algorithm: of the all-to-all: "linear", or "2dh" (two-dimensional hierarchical: first inside the
            nodes, then between them).
        capacity: "ragged" sends the rows there are; "padded" sends buffers of equal size for every expert, as
            large as the fullest one may be, so that no count travels ahead of the rows.
        codec: how rows are written on the wire: "none" as they are, "bf16", or "fp8" (e4m3 with one scale per
            row). Others than "none" round.
        kernel: what computes the experts: "auto", the first backend of `flexpert.ops` that can; "native",
            "grouped_mm" or "portable", that backend where it can; "recompute", as "auto", with the hidden
            layer computed again in backward; "separate", gather, products and combine as operators of their
            own. They differ in rounding alone.

    Raises:
        ConfigError: a value that no mesh can run.
    """

    r: int = 1
    degree: int = 1
    algorithm: str = "linear"
    capacity: str = "ragged"
    codec: str = "none"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for name, least, most in (("r", 0, None), ("degree", 1, MAX_DEGREE)):
            value = getattr(self, name)
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not valid or (most is not None and value > most):
                bound = f"{least}..{most}" if most is not None else f">= {least}"
                raise ConfigError(f"plan: {name}={value!r}, expected an integer {bound}")
        for name, options in _OPTIONS.items():
            if getattr(self, name) not in options:
                raise ConfigError(
                    f"plan: {name}={getattr(self, name)!r}, expected one of {', '.join(options)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `ExecutionPlan.from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExecutionPlan:
        """A plan from plain data.

        Raises:
            ConfigError: an unknown key or value.
        """
        check_options("plan", data, [field.name for field in dataclasses.fields(cls)])
        return cls(**data)

    def encode(self) -> list[int]:
        """The plan as small integers, for ranks to compare; `decode` is its inverse."""
        places = (options.index(getattr(self, name)) for name, options in _OPTIONS.items())
        return [self.r, self.degree, *places]

    @classmethod
    def decode(cls, numbers: list[int]) -> ExecutionPlan:
        """The plan of `encode`."""
        r, degree, *places = numbers
        chosen = {name: options[i] for (name, options), i in zip(_OPTIONS.items(), places, strict=True)}
        return cls(r=r, degree=degree, **chosen)


AnyPlan = ExecutionPlan | Literal["auto"]  # "auto": the tuner chooses


def check_plan(plan: AnyPlan) -> AnyPlan:
    """The plan itself.

    Raises:
        ConfigError: neither an `ExecutionPlan` nor "auto".
    """
    if isinstance(plan, ExecutionPlan) or plan == "auto":
        return plan
    raise ConfigError(f"plan={plan!r}: expected an ExecutionPlan or 'auto'")
