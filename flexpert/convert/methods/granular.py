"""Copies cut into pieces, with an exact start: MoE-Tuning of Dynamic-DINO (Lu et al., arXiv 2507.17436)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexpert.convert.dense import DenseMLP
from flexpert.core.config import MoEConfig, require_int

from .base import Method, Parts, layer_config, require_division


@dataclass(frozen=True, kw_only=True)
class Granular(Method):
    """G copies of the MLP, each cut into k pieces along the hidden layer: E = G k, K = k.

    The rows of the router are equal within a copy, so that a token first meets all pieces of one copy. Each
    has the weight 1 / k, times k, and a k-th of the output bias: that is the dense MLP. The rows are separate
    parameters, so training lets tokens mix pieces of several copies.

    Attributes:
        copies: G.
        pieces_per_copy: k.
    """

    name: ClassVar[str] = "granular"

    copies: int
    pieces_per_copy: int

    def check(self) -> None:
        """See `Method`."""
        require_int("copies", self.copies, least=1)
        require_int("pieces_per_copy", self.pieces_per_copy, least=1)

    def layer(self, mlp: DenseMLP) -> MoEConfig:
        """See `Method`."""
        k = self.pieces_per_copy
        weights = {"scale": float(k)} if k > 1 else {"straight_through": True}
        return layer_config(
            mlp,
            hidden_dim=require_division(mlp, k, "pieces_per_copy"),
            num_experts=self.copies * k,
            top_k=k,
            router={"name": "linear", **weights},
            renormalize=True,
        )

    def parts(self, mlp: DenseMLP, generator: torch.Generator, importance_F: Tensor | None) -> Parts:
        """See `Method`."""
        k = self.pieces_per_copy
        cuts = torch.arange(mlp.hidden_dim, device=mlp.w1.device).chunk(k)
        return Parts([mlp.neurons(cut, bias_share=1 / k) for cut in cuts] * self.copies)

    def rows(self, num_experts: int, width: int, generator: torch.Generator) -> Tensor:
        """See `Method`."""
        return super().rows(self.copies, width, generator).repeat_interleave(self.pieces_per_copy, 0)

    @property
    def why_not_exact(self) -> str | None:
        """See `Method`."""
        if self.router == "zero" and self.copies > 1:
            return "with a router of zeros no copy is preferred, and pieces of several may meet"
        return None

    @property
    def pieces(self) -> int:
        """See `Method`."""
        return self.pieces_per_copy
