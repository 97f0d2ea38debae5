"""The shared expert: a dense feed-forward part that every token visits (Dai et al., arXiv 2401.06066)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.core.autocast import without_autocast
from flexpert.core.config import require_int
from flexpert.ops.activations import get_activation

from .bank import ExpertBatch, autocast_dtype
from .mlp import GLUExperts, MLPExperts


class SharedExpert(nn.Module):
    """`count` experts of one size, computed as a single one of `count` times the hidden width.

    Args:
        count: number of shared experts.
        gated: GLU instead of MLP.
        gate: weigh the result by sigmoid(x . g), as Qwen2-MoE does (arXiv 2407.10671).
        dropout: on the hidden layer, in training.
        model_dim, hidden_dim, and the rest: as for `MLPExperts`, of one expert.
    """

    def __init__(
        self,
        *,
        count: int,
        gated: bool,
        gate: bool,
        model_dim: int,
        hidden_dim: int,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        require_int("count", count, least=1)
        require_int("hidden_dim", hidden_dim, least=1)
        self.dropout = dropout
        kind = GLUExperts if gated else MLPExperts
        self.expert = kind(num_experts=1, model_dim=model_dim, hidden_dim=count * hidden_dim, **options)
        self.gate = nn.Linear(model_dim, 1, bias=False) if gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, O) in x's dtype."""
        expert = self.expert
        x = x_TD.to(autocast_dtype(x_TD))
        with without_autocast(x.device):
            if expert.recompute or expert.is_packed:
                all_E = torch.full((1,), len(x), device=x.device)
                y_TO = expert(ExpertBatch(rows_ND=x, counts_E=all_E, unit_N=None))
            else:
                y_TO = self._dense(x)
            if self.gate is not None:
                y_TO = y_TO * F.linear(x, self.gate.weight.to(x.dtype)).sigmoid()
        return y_TO.to(x_TD.dtype)

    def _dense(self, x_TD: Tensor) -> Tensor:
        expert = self.expert
        w1, b1, w2, b2 = expert.weights_in(x_TD.dtype)
        hidden = F.linear(x_TD, w1[0].flatten(0, -2), None if b1 is None else b1[0].flatten())
        act = get_activation(expert.activation).forward
        if expert.gated:
            gate_TF, up_TF = hidden.chunk(2, dim=-1)
            hidden = act(gate_TF) * up_TF
        else:
            hidden = act(hidden)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return F.linear(hidden, w2[0], None if b2 is None else b2[0])

    def flops_per_token(self) -> int:
        """2 per weight."""
        extra = 0 if self.gate is None else 2 * self.gate.weight.numel()
        return self.expert.flops_of_experts()[0] + extra
