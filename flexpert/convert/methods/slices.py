"""One MLP cut along its hidden layer (FactorLLM, Zhao et al., arXiv 2408.11855; UoE, arXiv 2503.02495)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexpert.convert.dense import DenseMLP
from flexpert.core.config import MoEConfig, check_top_k, require_int

from .base import Method, Parts, layer_config, require_division


@dataclass(frozen=True, kw_only=True)
class Slice(Method):
    """E slices of equal width; all of them together are the dense MLP.

    Every chosen slice has the weight E / K, as in FactorLLM, and an E-th of the output bias: with K = E the
    plain sum, with K < E an estimate of it at K / E of the cost. The weight is the straight-through one, so
    that the router learns from the task (with FactorLLM's constant it would not).

    Attributes:
        num_experts: E.
        top_k: K; None for E.
    """

    name: ClassVar[str] = "slice"
    one_copy: ClassVar[bool] = True

    num_experts: int
    top_k: int | None = None

    def check(self) -> None:
        """See `Method`."""
        require_int("num_experts", self.num_experts, least=1)
        check_top_k(self._top_k, self.num_experts)

    @property
    def _top_k(self) -> int:
        return self.num_experts if self.top_k is None else self.top_k

    def layer(self, mlp: DenseMLP) -> MoEConfig:
        """See `Method`."""
        scale = self.num_experts / self._top_k
        return layer_config(
            mlp,
            hidden_dim=require_division(mlp, self.num_experts, "num_experts"),
            num_experts=self.num_experts,
            top_k=self._top_k,
            router={"name": "linear", "straight_through": True, "scale": scale},
        )

    def parts(self, mlp: DenseMLP, generator: torch.Generator, importance_F: Tensor | None) -> Parts:
        """See `Method`."""
        cuts = torch.arange(mlp.hidden_dim, device=mlp.w1.device).chunk(self.num_experts)
        return Parts([mlp.neurons(cut, bias_share=1 / self.num_experts) for cut in cuts])

    @property
    def why_not_exact(self) -> str | None:
        """See `Method`."""
        if self._top_k < self.num_experts:
            return f"a token meets {self._top_k} of the {self.num_experts} slices"
        return None

    @property
    def pieces(self) -> int:
        """See `Method`."""
        return self.num_experts
