"""What every conversion method is: a value that says which experts one MLP becomes.

Letters: D model_dim, F hidden_dim, E experts, K top_k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexpert.convert.dense import DenseMLP
from flexpert.core.config import MoEConfig, require_number
from flexpert.core.errors import ConfigError


@dataclass(frozen=True)
class Parts:
    """The experts that one MLP becomes, and the part of it that every token visits."""

    experts: list[DenseMLP]
    shared: DenseMLP | None = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """How a dense MLP becomes a MoE layer.

    Attributes:
        name: of the method.
        needs_calibration: it ranks neurons by their activity on data.
        one_copy: all experts together are one MLP, however many there are.
        router: initial rows of the router: "random", normal of `router_std`; or "zero", with which every
            expert has the same score, so that the first K are taken until the router has learned.
        router_std: of a random router.
    """

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False
    one_copy: ClassVar[bool] = False

    router: str = "random"
    router_std: float = 0.02

    def __post_init__(self) -> None:
        if self.router not in ("random", "zero"):
            raise ConfigError(f"router={self.router!r}: expected 'random' or 'zero'")
        require_number("router_std", self.router_std, above=0)
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise `ConfigError` for values that no MLP could be converted with."""

    @abstractmethod
    def layer(self, mlp: DenseMLP) -> MoEConfig:
        """The layer that the MLP becomes.

        Raises:
            ConfigError: sizes that do not divide.
        """

    @abstractmethod
    def parts(self, mlp: DenseMLP, generator: torch.Generator, importance_F: Tensor | None) -> Parts:
        """The experts' weights.

        Args:
            mlp: the dense MLP.
            generator: of random numbers, on the CPU.
            importance_F: of each hidden neuron, for methods that need calibration.
        """

    @property
    @abstractmethod
    def why_not_exact(self) -> str | None:
        """None where the converted layer computes what the dense one did; else why it does not."""

    @property
    def pieces(self) -> int:
        """Experts that together are one copy of the MLP."""
        return 1

    def rows(self, num_experts: int, width: int, generator: torch.Generator) -> Tensor:
        """Initial router rows (E, D), fp32."""
        rows_ED = torch.zeros(num_experts, width)
        return rows_ED if self.router == "zero" else rows_ED.normal_(0, self.router_std, generator=generator)


def layer_config(mlp: DenseMLP, **settings: Any) -> MoEConfig:
    """The configuration of a layer whose experts are of the kind of an MLP."""
    kind = "glu" if mlp.gated else "mlp"
    return MoEConfig(
        model_dim=mlp.model_dim,
        output_dim=None if mlp.output_dim == mlp.model_dim else mlp.output_dim,
        expert={"name": f"{kind}_dropout", "dropout": mlp.dropout} if mlp.dropout else kind,
        activation=mlp.activation,
        expert_bias=mlp.expert_bias,
        **settings,
    )


def require_division(mlp: DenseMLP, parts: int, meaning: str) -> int:
    """hidden_dim / parts; `ConfigError` with the numbers that would do where it leaves a rest."""
    hidden = mlp.hidden_dim
    if hidden % parts:
        near = sorted((d for d in range(1, hidden + 1) if hidden % d == 0), key=lambda d: abs(d - parts))
        raise ConfigError(
            f"{meaning}={parts} does not divide the MLP's hidden_dim={hidden}; it divides by "
            f"{', '.join(map(str, sorted(near[:4])))}"
        )
    return hidden // parts
