"""Sparse upcycling: every expert begins as a copy of the MLP (Komatsuzaki et al., arXiv 2212.05055)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexpert.convert.dense import DenseMLP
from flexpert.core.config import MoEConfig, check_top_k, require_int, require_number
from flexpert.core.errors import ConfigError

from .base import Method, Parts, layer_config


@dataclass(frozen=True, kw_only=True)
class Clone(Method):
    """E copies of the MLP; with neither `perturb` nor `redraw` the layer computes what the MLP did.

    With K > 1 the K weights are divided by their sum, with K = 1 the weight is the straight-through one, of
    value 1 (the original upcycling leaves the gate's weight as it is, and starts with a jump).

    Attributes:
        num_experts: E.
        top_k: K.
        perturb: every weight of every copy gets normal noise of this share of its tensor's standard
            deviation.
        redraw: Drop-Upcycling (Nakamura et al., arXiv 2502.19261): this share of each expert's hidden
            neurons, chosen anew for each expert, is drawn from a normal distribution with the mean and
            standard deviation of the weights it takes the place of. The paper finds 0.5 best.
    """

    name: ClassVar[str] = "clone"

    num_experts: int
    top_k: int = 1
    perturb: float = 0.0
    redraw: float = 0.0

    def check(self) -> None:
        """See `Method`."""
        require_int("num_experts", self.num_experts, least=1)
        check_top_k(self.top_k, self.num_experts)
        require_number("perturb", self.perturb, least=0)
        require_number("redraw", self.redraw, least=0)
        if self.redraw > 1:
            raise ConfigError(f"redraw={self.redraw}: expected a share of the neurons, 0 to 1")

    def layer(self, mlp: DenseMLP) -> MoEConfig:
        """See `Method`."""
        return layer_config(
            mlp,
            hidden_dim=mlp.hidden_dim,
            num_experts=self.num_experts,
            top_k=self.top_k,
            router={"name": "linear", "straight_through": True} if self.top_k == 1 else "linear",
            renormalize=True,
        )

    def parts(self, mlp: DenseMLP, generator: torch.Generator, importance_F: Tensor | None) -> Parts:
        """See `Method`."""
        return Parts([self._expert(mlp, generator) for _ in range(self.num_experts)])

    @property
    def why_not_exact(self) -> str | None:
        """See `Method`."""
        changes = [f"{name}={value}" for name in ("perturb", "redraw") if (value := getattr(self, name))]
        return f"{' and '.join(changes)} changed the experts' weights" if changes else None

    def _expert(self, mlp: DenseMLP, generator: torch.Generator) -> DenseMLP:
        tensors = mlp.tensors()
        if self.redraw:
            count = int(self.redraw * mlp.hidden_dim)
            index = torch.randperm(mlp.hidden_dim, generator=generator)[:count]
            tensors = {name: _redrawn(name, tensor, index, generator) for name, tensor in tensors.items()}
        if self.perturb:
            tensors = {
                name: tensor + self.perturb * _std(tensor) * _normal(tensor, generator)
                for name, tensor in tensors.items()
            }
        return mlp.with_tensors(tensors)


def _redrawn(name: str, tensor: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """With the neurons of `index` drawn anew, gate and up each by its own statistics."""
    if name == "b2" or not len(index):  # of the output, which has no neurons of its own
        return tensor
    index = index.to(tensor.device)
    axis = {"w1": -2, "b1": -1, "w2": 1}[name]
    old = tensor.index_select(axis, index)
    gates = (-2, -1) if name == "w1" else (-1,) if name == "b1" else (0, 1)
    mean, std = old.mean(gates, keepdim=True), old.std(gates, correction=0, keepdim=True)
    return tensor.index_copy(axis, index, mean + std * _normal(old, generator))


def _std(tensor: Tensor) -> Tensor:
    return tensor.std(correction=0)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
