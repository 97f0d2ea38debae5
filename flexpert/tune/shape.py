"""One layer of equal experts, and how it lies on its ranks, as numbers.

Letters: W ranks, P of one replica, E experts, S slices, D, F and O widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from flexpert.core.errors import ConfigError
from flexpert.core.registry import check_options
from flexpert.parallel.grid import RankGrid
from flexpert.parallel.predict import Part

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BIASES = ("none", "b1", "b2", "both")
_SIZES = ("model_dim", "hidden_dim", "output_dim", "num_experts", "expert_ranks", "slices", "replicas",
          "ranks_per_node")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer of equal experts, and how it lies on its ranks.

    Attributes:
        model_dim, hidden_dim, output_dim, num_experts: D, F, O and E.
        gated: two products into the hidden layer in place of one.
        bias: "none", "b1", "b2" or "both".
        dtype: that rows travel and experts compute in.
        parameter_dtype: that parameters, gradients and moments are stored in.
        expert_ranks, slices, replicas: the factors of the mesh; slices divide the hidden dimension.
        ranks_per_node: neighbours that share a node.
        verify: ranks compare what they are about to do; as in `flexpert.parallel.parallelize`.

    Raises:
        ConfigError: a value that cannot be; the message names the field.
    """

    model_dim: int
    hidden_dim: int
    output_dim: int
    num_experts: int
    gated: bool = False
    bias: str = "none"
    dtype: str = "float32"
    parameter_dtype: str = "float32"
    expert_ranks: int
    slices: int = 1
    replicas: int = 1
    ranks_per_node: int
    verify: bool = True

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"shape: {name}={value!r}, expected an integer >= 1")
        for name in ("gated", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"shape: {name}={getattr(self, name)!r}, expected true or false")
        for name, options in (("bias", BIASES), ("dtype", DTYPES), ("parameter_dtype", DTYPES)):
            if getattr(self, name) not in options:
                raise ConfigError(
                    f"shape: {name}={getattr(self, name)!r}, expected one of {', '.join(options)}"
                )
        for name, whole, parts in (
            ("expert_ranks", "num_experts", self.expert_ranks),
            ("slices", "hidden_dim", self.slices),
        ):
            if getattr(self, whole) % parts:
                raise ConfigError(
                    f"shape: {name}={parts} does not divide {whole}={getattr(self, whole)}; choose a divisor"
                )

    @classmethod
    def of(cls, mesh: Any, bank: Any, *, dtype: torch.dtype | None = None, verify: bool = True) -> LayerShape:
        """That of a bank of equal experts, laid out over a mesh or about to be.

        Args:
            mesh: `ExpertMesh`.
            bank: `MLPExperts` or `GLUExperts`.
            dtype: that its rows have; None for that of the parameters.
            verify: of the layer's transport.

        Raises:
            ConfigError: experts of another kind.
        """
        if not hasattr(bank, "hidden_dim") or not hasattr(bank, "w1"):
            raise ConfigError(
                f"{type(bank).__name__} is no bank of equal experts with a hidden layer; "
                f"only such banks have a cost model"
            )
        stored = bank.w1.dtype
        return cls(
            model_dim=bank.model_dim,
            hidden_dim=bank.hidden_dim,
            output_dim=bank.output_dim,
            num_experts=bank.num_experts,
            gated=bool(bank.gated),
            bias=BIASES[(bank.b1 is not None) + 2 * (bank.b2 is not None)],
            dtype=str(dtype or stored).removeprefix("torch."),
            parameter_dtype=str(stored).removeprefix("torch."),
            expert_ranks=mesh.expert_ranks,
            slices=mesh.slices,
            replicas=mesh.replicas,
            ranks_per_node=mesh.ranks_per_node,
            verify=verify,
        )

    @property
    def ranks(self) -> int:
        """P: ranks of a replica, which exchange rows."""
        return self.expert_ranks * self.slices

    @property
    def world(self) -> int:
        """W: ranks of all replicas."""
        return self.ranks * self.replicas

    @property
    def local_experts(self) -> int:
        """Experts of one rank."""
        return self.num_experts // self.expert_ranks

    @property
    def inputs(self) -> int:
        """Rows of an expert's first matrix per hidden unit: 2 of a gated one."""
        return 2 if self.gated else 1

    @property
    def params_per_expert(self) -> int:
        """Parameters of one expert."""
        hidden = self.inputs * self.hidden_dim
        biases = hidden * (self.bias in ("b1", "both")) + self.output_dim * (self.bias in ("b2", "both"))
        return hidden * self.model_dim + self.output_dim * self.hidden_dim + biases

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of an expert's matrix products for one row, forward."""
        return 2 * self.hidden_dim * (self.inputs * self.model_dim + self.output_dim)

    @cached_property
    def legal_r(self) -> tuple[int, ...]:
        """The values of r that a plan may have: 0 and the divisors of S."""
        return self.grid.legal_r

    @cached_property
    def grid(self) -> RankGrid:
        """How the ranks lie."""
        return RankGrid(
            replicas=self.replicas,
            expert_ranks=self.expert_ranks,
            slices=self.slices,
            ranks_per_node=self.ranks_per_node,
        )

    @cached_property
    def local_ranks(self) -> int | None:
        """Ranks of a replica on each node it lies on; None where these differ."""
        return self.grid.places_per_node()

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What one rank holds of each parameter."""
        experts, hidden = self.local_experts, self.hidden_dim // self.slices
        size = DTYPES[self.parameter_dtype].itemsize
        found = [
            Part(experts * self.inputs * hidden * self.model_dim, size, True),
            Part(experts * self.output_dim * hidden, size, True),
        ]
        if self.bias in ("b1", "both"):
            found.append(Part(experts * self.inputs * hidden, size, True))
        if self.bias in ("b2", "both"):
            found.append(Part(experts * self.output_dim, size, False))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerShape:
        """A shape from plain data.

        Raises:
            ConfigError: an unknown or missing key, or a bad value.
        """
        fields = dataclasses.fields(cls)
        check_options("shape", data, [field.name for field in fields])
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in data]
        if missing:
            raise ConfigError(f"shape: {missing[0]} is missing")
        return cls(**data)
