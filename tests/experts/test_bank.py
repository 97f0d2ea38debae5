"""What banks share: slots of rows, and kinds of one's own."""

from __future__ import annotations

import pytest
import torch

from flexpert import ConfigError, MoE, MoEConfig
from flexpert.core.registry import EXPERTS
from flexpert.experts import ExpertBank
from flexpert.experts.bank import slots_of_rows
from flexpert.testing import assert_close


def test_slots_of_rows():
    counts = torch.tensor([2, 0, 3])
    assert slots_of_rows(counts, None, 7).tolist() == [0, 0, 2, 2, 2, -1, -1]
    assert slots_of_rows(counts, torch.tensor([4, 0, -1]), 6).tolist() == [4, 4, -1, -1, -1, -1]
    assert slots_of_rows(torch.tensor([0, 0]), None, 0).tolist() == []


def test_a_kind_of_ones_own(monkeypatch):
    monkeypatch.setattr(EXPERTS, "_parts", dict(EXPERTS._parts))

    @EXPERTS.register("scale")
    class ScaleExperts(ExpertBank):
        def __init__(self, *, num_experts, model_dim, factor=1.0):
            super().__init__(num_experts=num_experts, model_dim=model_dim, output_dim=model_dim)
            self.factor = torch.nn.Parameter(torch.full((num_experts,), factor))

        def forward(self, batch):
            factor_N = self.factor.to(batch.rows_ND.dtype).repeat_interleave(batch.counts_E)
            rest = batch.rows_ND.new_zeros(len(batch.rows_ND) - len(factor_N))
            return batch.rows_ND * torch.cat([factor_N, rest])[:, None]

    config = MoEConfig(
        model_dim=3,
        hidden_dim=1,
        num_experts=4,
        top_k=2,
        renormalize=True,
        expert={"name": "scale", "factor": 2.5},
    )
    layer, x = config.build(), torch.randn(6, 3)
    assert not layer.transport.fused
    assert_close(layer(x), 2.5 * x)
    assert config.num_params() == 3 * 4 + 4
    with pytest.raises(ConfigError, match="expert name 'scale' is taken"):
        EXPERTS.register("scale")(ScaleExperts)


def test_a_bank_must_compute():
    bank = ExpertBank(num_experts=2, model_dim=3, output_dim=3)
    with pytest.raises(TypeError, match=r"ExpertBank must define forward\(batch\)"):
        bank(None)
    with pytest.raises(TypeError, match="ExpertBank has no fused path"):
        bank.fused(None, None)


def test_router_and_bank_must_agree():
    from flexpert.experts import MLPExperts
    from flexpert.routers import LinearRouter

    bank = MLPExperts(num_experts=2, model_dim=3, hidden_dim=4)
    with pytest.raises(ConfigError, match="the router has num_experts=3, the experts num_experts=2"):
        MoE(router=LinearRouter(model_dim=3, num_experts=3), experts=bank)
    with pytest.raises(ConfigError, match="the router has model_dim=5, the experts model_dim=3"):
        MoE(router=LinearRouter(model_dim=5, num_experts=2), experts=bank)
