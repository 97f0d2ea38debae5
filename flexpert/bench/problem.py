"""The layers that are measured, and their random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One mixture-of-experts layer of `tokens` tokens; capacity_factor None means dropless."""

    tokens: int
    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    capacity_factor: float | None
    gated: bool
    activation: str

    @property
    def expert_size(self) -> int:
        """Weights of one expert."""
        return (3 if self.gated else 2) * self.model_dim * self.hidden_dim

    @property
    def capacity(self) -> int | None:
        """Rows an expert keeps; None for all."""
        if self.capacity_factor is None:
            return None
        fair = -(-self.tokens // self.num_experts)
        return self.top_k * max(1, int(self.capacity_factor * fair))


SHAPES = {
    "A": Shape(
        tokens=4096, model_dim=1024, hidden_dim=1024, num_experts=8, top_k=2, capacity_factor=1.0,
        gated=False, activation="gelu",
    ),
    "B": Shape(
        tokens=4096, model_dim=1024, hidden_dim=512, num_experts=64, top_k=6, capacity_factor=None,
        gated=True, activation="silu",
    ),
    "C": Shape(
        tokens=3136, model_dim=512, hidden_dim=2048, num_experts=32, top_k=1, capacity_factor=1.25,
        gated=False, activation="gelu",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs with gradients; `id_TK` is num_experts where capacity dropped the assignment."""

    shape: Shape
    dtype: torch.dtype
    x_TD: Tensor
    router_ED: nn.Parameter
    id_TK: Tensor
    weight_TK: Tensor
    w1: nn.Parameter
    w2: nn.Parameter
    grad_TD: Tensor

    @property
    def rows(self) -> int:
        """Assignments that are kept."""
        return int((self.id_TK < self.shape.num_experts).sum())

    @property
    def flops(self) -> int:
        """Useful floating-point operations of a forward pass: those of the kept rows' products."""
        return 2 * self.rows * self.shape.expert_size

    @property
    def touched_bytes(self) -> int:
        """Bytes of the weights of all experts that have a row."""
        experts = int((self.id_TK.unique() < self.shape.num_experts).sum())
        return experts * self.shape.expert_size * self.dtype.itemsize

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that get a gradient."""
        return [self.x_TD, self.router_ED, self.weight_TK, self.w1, self.w2]


def make_problem(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Gaussian tokens through a random linear router; capacity keeps the first choices first."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(0, scale, generator=generator)

    def uniform(*size: int, scale: float) -> Tensor:  # for the large ones: quicker to draw
        return torch.empty(size, dtype=dtype).uniform_(-scale, scale, generator=generator)

    model_dim, hidden_dim, num_experts = shape.model_dim, shape.hidden_dim, shape.num_experts
    inner = (2, hidden_dim) if shape.gated else (hidden_dim,)
    x_TD = normal(shape.tokens, model_dim, scale=1.0)
    router_ED = normal(num_experts, model_dim, scale=model_dim**-0.5)
    weight_TK, id_TK = torch.softmax(x_TD.float() @ router_ED.float().T, 1).topk(shape.top_k)
    if shape.capacity is not None:
        first = id_TK.T.reshape(-1)  # all first choices, then all second choices
        hot = torch.nn.functional.one_hot(first, num_experts)
        rank = (hot.cumsum(0) - 1).gather(1, first[:, None])[:, 0]
        id_TK = torch.where(rank < shape.capacity, first, num_experts).view(shape.top_k, -1).T.contiguous()
    return Problem(
        shape=shape,
        dtype=dtype,
        x_TD=x_TD.requires_grad_(),
        router_ED=nn.Parameter(router_ED),
        id_TK=id_TK,
        weight_TK=weight_TK.requires_grad_(),
        w1=nn.Parameter(uniform(num_experts, *inner, model_dim, scale=model_dim**-0.5)),
        w2=nn.Parameter(uniform(num_experts, model_dim, hidden_dim, scale=hidden_dim**-0.5)),
        grad_TD=normal(shape.tokens, model_dim, scale=1.0),
    )
