"""Experts that cost nothing: zero, copy and constant (MoE++, Jin et al., arXiv 2410.07348, section 3.1)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from flexpert.core.registry import EXPERTS
from flexpert.core.routing import Routing
from flexpert.core.seeding import Drawn, draw_base, draw_normal, draw_uniform

from .bank import ExpertBank, ExpertBatch, slots_of_rows, weighted_sum


class _LocalExperts(ExpertBank):
    """Experts that stay with their token: no all-to-all, no matrix product over D x D."""

    remote = False

    def __init__(self, *, num_experts: int, model_dim: int) -> None:
        super().__init__(num_experts=num_experts, model_dim=model_dim, output_dim=model_dim)


class ZeroExperts(_LocalExperts):
    """y = 0: the token skips the layer."""

    has_fused = True

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Zeros (N, D)."""
        return torch.zeros_like(batch.rows_ND)

    def fused(self, x_TD: Tensor, routing: Routing, slot_E: Tensor | None = None) -> Tensor:
        """Zeros (T, D)."""
        return torch.zeros_like(x_TD)


class CopyExperts(_LocalExperts):
    """y = x."""

    has_fused = True

    def forward(self, batch: ExpertBatch) -> Tensor:
        """The rows themselves."""
        slot_N = slots_of_rows(batch.counts_E, batch.slot_E, batch.rows_ND.shape[0])
        return batch.rows_ND.masked_fill((slot_N < 0)[:, None], 0.0)

    def fused(self, x_TD: Tensor, routing: Routing, slot_E: Tensor | None = None) -> Tensor:
        """x times the sum of the token's weights on these experts: O(T D), whatever N is."""
        slot_N = slots_of_rows(routing.counts_E, slot_E, routing.unit_N.shape[0])
        weight_N = routing.weight_N.masked_fill(slot_N < 0, 0.0)
        weight_T = weight_N.new_zeros(routing.num_units).index_add(0, routing.unit_N, weight_N)
        return torch.where(weight_T[:, None] != 0, x_TD * weight_T[:, None], 0.0).to(x_TD.dtype)


class ConstantExperts(_LocalExperts):
    """y = a1 x + a2 v with [a1, a2] = softmax(W x): a learned vector, mixed in by a learned share.

    Parameters: `weight` (E, 2, D), `value` (E, D).
    """

    has_fused = True

    def __init__(self, *, num_experts: int, model_dim: int) -> None:
        super().__init__(num_experts=num_experts, model_dim=model_dim)
        self.weight = nn.Parameter(torch.empty(num_experts, 2, model_dim))
        self.value = nn.Parameter(torch.empty(num_experts, model_dim))
        base = draw_base()
        self.initial["weight"] = Drawn(base, "weight", partial(draw_uniform, bound=model_dim**-0.5))
        self.initial["value"] = Drawn(base, "value", draw_normal)
        for name, parameter in self.named_parameters(recurse=False):
            self.initial[name].fill(parameter)

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Results (N, D) of the rows; see `ExpertBank.forward`."""
        slot_N = slots_of_rows(batch.counts_E, batch.slot_E, batch.rows_ND.shape[0])
        rows_ND = batch.rows_ND.masked_fill((slot_N < 0)[:, None], 0.0)
        place_N = slot_N.clamp(min=0)
        weight = self.weight.to(rows_ND.dtype)
        logits_N2 = (rows_ND[:, None] * weight[place_N]).sum(-1)
        share_N2 = logits_N2.softmax(-1)
        mixed_ND = share_N2[:, :1] * rows_ND + share_N2[:, 1:] * self.value.to(rows_ND.dtype)[place_N]
        return mixed_ND.masked_fill((slot_N < 0)[:, None], 0.0)

    def fused(self, x_TD: Tensor, routing: Routing, slot_E: Tensor | None = None) -> Tensor:
        """See `ExpertBank.fused`."""
        batch = ExpertBatch(
            rows_ND=x_TD[routing.unit_N], counts_E=routing.counts_E, unit_N=routing.unit_N, slot_E=slot_E
        )
        return weighted_sum(self(batch), routing, x_TD.dtype)

    def flops_of_experts(self) -> list[int]:
        """The two dot products: 4 D."""
        return [4 * self.model_dim] * self.num_experts


EXPERTS.register("zero")(ZeroExperts)
EXPERTS.register("copy")(CopyExperts)
EXPERTS.register("constant")(ConstantExperts)
