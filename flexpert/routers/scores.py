"""Score functions: tokens to logits, one per expert.

A score is a base class with `score(x_TD, context) -> logits_TE` (fp32, fp64 for fp64 input) and
`score_flops()`; a router inherits from one score and one kind of choice, so that its parameters are its own
(`router.weight`). Constructors pass on what they do not take.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert import ops
from flexpert.core.config import require_bool, require_int, require_number
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.registry import suggest
from flexpert.core.seeding import Constant, Drawn, derive_seed, draw_base, draw_normal

from .base import Router
from .noise import uniform


def routing_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 tokens, else fp32: the precision of routing, weights and losses."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def add_normal_weight(router: Router, shape: tuple[int, ...], std: float) -> None:
    """Give a router a parameter `weight` of normal values from a generator of its own."""
    router.weight = nn.Parameter(torch.empty(shape))
    router.initial["weight"] = Drawn(draw_base(), "router", partial(draw_normal, std=std), per_expert=False)
    router.initial["weight"].fill(router.weight)


class LinearScore(Router):
    """logits = x W^T without bias (Shazeer et al., arXiv 1701.06538).

    Args:
        fp32: compute in fp32 whatever the dtype of x (the weight keeps its dtype); else in x's dtype.
    """

    weight: nn.Parameter

    def __init__(self, *, model_dim: int, num_experts: int, fp32: bool = True, **rules: Any) -> None:
        super().__init__(model_dim=model_dim, num_experts=num_experts, **rules)
        require_bool("fp32", fp32)
        self.fp32 = fp32
        add_normal_weight(self, (num_experts, model_dim), 1 / math.sqrt(model_dim))

    def score(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Logits (T, E)."""
        if self.fp32 and x_TD.dtype == self.weight.dtype:
            return ops.router_logits(x_TD, self.weight)
        dtype = routing_dtype(x_TD.dtype)
        compute = dtype if self.fp32 else x_TD.dtype
        return F.linear(x_TD.to(compute), self.weight.to(compute)).to(dtype)

    def score_flops(self) -> int:
        """2 D E."""
        return 2 * self.weight.numel()


class CosineScore(Router):
    """logits = cos(W x, M_e) / temperature, as in SwinV2-MoE (Hwang et al., arXiv 2206.03382, section 5.3).

    The temperature is learned and at least `min_temperature`.

    Args:
        proj_dim: width of the space the cosine is taken in.
        temperature: its initial value.
        min_temperature: its floor.
    """

    weight: nn.Parameter

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        proj_dim: int = 256,
        temperature: float = 0.5,
        min_temperature: float = 0.01,
        **rules: Any,
    ) -> None:
        super().__init__(model_dim=model_dim, num_experts=num_experts, **rules)
        require_int("proj_dim", proj_dim, least=1)
        require_number("temperature", temperature)
        require_number("min_temperature", min_temperature)
        if not 0 < min_temperature <= temperature:
            raise ConfigError(
                f"temperature={temperature!r}, min_temperature={min_temperature!r}: expected "
                f"0 < min_temperature <= temperature"
            )
        self.max_log_scale = math.log(1 / min_temperature)
        self.projector = nn.Linear(model_dim, proj_dim)
        add_normal_weight(self, (num_experts, proj_dim), 0.01)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.initial["log_scale"] = Constant(math.log(1 / temperature))

    def score(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Logits (T, E)."""
        dtype = routing_dtype(x_TD.dtype)
        projector = self.projector
        h_TP = F.linear(x_TD.to(dtype), projector.weight.to(dtype), projector.bias.to(dtype))
        cosine_TE = F.normalize(h_TP, dim=-1) @ F.normalize(self.weight.to(dtype), dim=-1).T
        return cosine_TE * self.log_scale.to(dtype).clamp(max=self.max_log_scale).exp()

    def score_flops(self) -> int:
        """2 (D P + P E)."""
        return 2 * (self.projector.weight.numel() + self.weight.numel())


class HashScore(Router):
    """A fixed pseudo-random score of (token id, expert): hash routing (Roller et al., arXiv 2106.04426).

    Every token id ranks the experts in an order of its own, so any K gives K distinct experts.
    """

    def __init__(self, *, seed: int = 0, **rules: Any) -> None:
        super().__init__(**rules)
        self.hash_seed = derive_seed(seed, "hash")

    def score(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Logits (T, E) in (0, 1); no gradient.

        Raises:
            InputError: the context has no token ids.
        """
        if context.token_ids is None:
            raise InputError("token_ids is missing: the hash router needs RoutingContext(token_ids=...)")
        experts_E = torch.arange(self.num_experts, device=x_TD.device)
        key = torch.full((), self.hash_seed, device=x_TD.device)
        scores = uniform(key, context.token_ids[:, None] * self.num_experts + experts_E)
        return scores.to(routing_dtype(x_TD.dtype))

    def score_flops(self) -> int:
        """0: nothing is multiplied."""
        return 0


def check_scoring(name: str) -> None:
    """Raise `ConfigError` unless a scoring has that name; the message lists those that have one."""
    if name not in ops.SCORINGS:
        raise ConfigError(f"unknown scoring {name!r}: {suggest(name, ops.SCORINGS)}")


def scoring(name: str, logits_TE: Tensor) -> Tensor:
    """Gate scores (T, E) from logits: softmax, sigmoid, sqrt_softplus, or uniform (1 for all)."""
    return ops.SCORINGS[name](logits_TE)
