"""The most active neurons shared, the others dealt out: MoE Adaptation (He et al., arXiv 2512.02351)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexpert.convert.dense import DenseMLP
from flexpert.core.config import MoEConfig, check_top_k, require_int, require_number
from flexpert.core.errors import ConfigError

from .base import Method, Parts, layer_config, require_division


@dataclass(frozen=True, kw_only=True)
class Importance(Method):
    """The most active neurons shared, the rest dealt to E experts in snake order of their activity.

    y = shared(x) + sum of (1 + r) expert(x) over the chosen, r the choice's logit. The router begins with
    zeros, so r = 0 and all experts together are the dense MLP; the output bias is the shared expert's. (The
    published code also gates the shared expert by 1 + g(x), g = 0 at first; here it has no gate.)

    Attributes:
        num_experts: E.
        top_k: K; None for E.
        num_shared: width of the shared expert, in experts: num_shared / (E + num_shared) of the neurons.
        shared_ratio: share of the neurons that is shared, in place of `num_shared`; rounded so that what is
            left divides by E.
    """

    name: ClassVar[str] = "importance"
    needs_calibration: ClassVar[bool] = True
    one_copy: ClassVar[bool] = True

    num_experts: int
    top_k: int | None = None
    num_shared: int = 1
    shared_ratio: float | None = None
    router: str = "zero"

    def check(self) -> None:
        """See `Method`."""
        require_int("num_experts", self.num_experts, least=1)
        require_int("num_shared", self.num_shared, least=1)
        if self.shared_ratio is not None:
            require_number("shared_ratio", self.shared_ratio, above=0)
            if self.num_shared != 1 or self.shared_ratio >= 1:
                raise ConfigError(
                    f"shared_ratio={self.shared_ratio}, num_shared={self.num_shared}: expected a share "
                    f"between 0 and 1, in place of num_shared"
                )
        check_top_k(self._top_k, self.num_experts)

    @property
    def _top_k(self) -> int:
        return self.num_experts if self.top_k is None else self.top_k

    def layer(self, mlp: DenseMLP) -> MoEConfig:
        """See `Method`."""
        width, shared = self._widths(mlp)
        return layer_config(
            mlp,
            hidden_dim=width,
            num_experts=self.num_experts,
            top_k=self._top_k,
            num_shared_experts=1 if self.shared_ratio else self.num_shared,
            shared_hidden_dim=shared if self.shared_ratio else None,
            combine={"name": "one_plus", "logits": True},
        )

    def _widths(self, mlp: DenseMLP) -> tuple[int, int]:
        """Hidden neurons of an expert, and of the shared one."""
        if self.shared_ratio is None:
            width = require_division(mlp, self.num_experts + self.num_shared, "num_experts + num_shared")
            return width, self.num_shared * width
        width = round((1 - self.shared_ratio) * mlp.hidden_dim / self.num_experts)
        shared = mlp.hidden_dim - self.num_experts * width
        if width < 1 or shared < 1:
            raise ConfigError(
                f"shared_ratio={self.shared_ratio} of the MLP's hidden_dim={mlp.hidden_dim} leaves each of "
                f"{self.num_experts} experts {width} neurons, and the shared one {shared}; change it"
            )
        return width, shared

    def parts(self, mlp: DenseMLP, generator: torch.Generator, importance_F: Tensor | None) -> Parts:
        """See `Method`."""
        assert importance_F is not None
        order_F = importance_F.argsort(descending=True, stable=True).to(mlp.w1.device)
        width, shared = self._widths(mlp)
        shared_F, rest_F = order_F.split([shared, self.num_experts * width])
        experts = [mlp.neurons(hand, bias_share=0.0) for hand in deal(rest_F, self.num_experts)]
        return Parts(experts, shared=mlp.neurons(shared_F))

    @property
    def why_not_exact(self) -> str | None:
        """See `Method`."""
        if self.router != "zero":
            return "a random router weighs the experts by 1 + r"
        if self._top_k < self.num_experts:
            return f"a token meets {self._top_k} of the {self.num_experts} experts besides the shared one"
        return None

    @property
    def pieces(self) -> int:
        """See `Method`."""
        return self.num_experts


def deal(items: Tensor, hands: int) -> list[Tensor]:
    """Items in snake order: row after row of one for each hand, every second row from the last hand on."""
    rows = items.view(-1, hands).clone()
    rows[1::2] = rows[1::2].flip(1)
    return list(rows.T)
