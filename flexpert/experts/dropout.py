"""Experts with dropout on their hidden layer, as T5 and SwinV2-MoE have it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flexpert import ops
from flexpert.core.errors import ConfigError
from flexpert.core.registry import EXPERTS
from flexpert.core.routing import Routing
from flexpert.ops.activations import get_activation

from .bank import ExpertBank, ExpertBatch, autocast_dtype, weighted_sum
from .mlp import MLPExperts

DEFAULT_DROPOUT = 0.1


@EXPERTS.register("mlp_dropout")
class DropoutMLPExperts(MLPExperts):
    """`MLPExperts` with dropout on the hidden layer in training: y = dropout(act(x W1^T + b1)) W2^T + b2.

    Args:
        num_experts, model_dim, hidden_dim, output_dim, activation, bias, init_std: see `MLPExperts`.
        dropout: share of the hidden values set to 0; the others are divided by 1 - dropout.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        output_dim: int | None = None,
        activation: str = "gelu",
        bias: bool | str = False,
        init_std: float | None = None,
        dropout: float = DEFAULT_DROPOUT,
    ) -> None:
        super().__init__(
            num_experts=num_experts,
            model_dim=model_dim,
            hidden_dim=hidden_dim,
            output_dim=output_dim,
            activation=activation,
            bias=bias,
            init_std=init_std,
        )
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout={dropout!r}: expected a number in 0 <= dropout < 1")
        self.dropout = dropout

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Results (N, O) of the rows; see `ExpertBank.forward`."""
        if self.is_packed:  # and so in eval mode
            return super().forward(batch)
        rows_ND = batch.rows_ND.to(autocast_dtype(batch.rows_ND))
        w1, b1, w2, b2 = self.weights_in(rows_ND.dtype)
        b1 = None if b1 is None else b1.flatten(1)
        pre = ops.grouped_linear(rows_ND, w1.flatten(1, -2), b1, batch.counts_E, batch.slot_E)
        act = get_activation(self.activation).forward
        if self.gated:
            gate_NF, up_NF = pre.chunk(2, dim=-1)
            hidden_NF = act(gate_NF) * up_NF
        else:
            hidden_NF = act(pre)
        hidden_NF = F.dropout(hidden_NF, self.dropout, self.training)
        return ops.grouped_linear(hidden_NF, w2, b2, batch.counts_E, batch.slot_E)

    def rows(self, x_RD: Tensor, unit_N: Tensor, counts_E: Tensor, slot_E: Tensor | None = None) -> Tensor:
        """See `ExpertBank.rows`; in one operator where nothing is dropped."""
        if not (self.training and self.dropout):
            return super().rows(x_RD, unit_N, counts_E, slot_E)
        return ExpertBank.rows(self, x_RD, unit_N, counts_E, slot_E)

    def fused(self, x_TD: Tensor, routing: Routing, slot_E: Tensor | None = None) -> Tensor:
        """The fused operator where nothing is dropped; otherwise gather, experts and weighted sum."""
        if not (self.training and self.dropout):
            return super().fused(x_TD, routing, slot_E)
        rows_ND = ops.gather_rows(x_TD, routing.unit_N, routing.counts_E)
        batch = ExpertBatch(rows_ND=rows_ND, counts_E=routing.counts_E, unit_N=routing.unit_N, slot_E=slot_E)
        return weighted_sum(self(batch), routing, x_TD.dtype)


@EXPERTS.register("glu_dropout")
class DropoutGLUExperts(DropoutMLPExperts):
    """`GLUExperts` with dropout on the hidden layer in training; arguments as of `DropoutMLPExperts`."""

    gated = True
