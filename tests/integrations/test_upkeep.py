"""Two ranks that share a batch move biases, and report, as one process with the whole batch."""

from __future__ import annotations

import torch

from flexpert import MoE, MoEConfig
from flexpert.integrations.upkeep import RoutingUpkeep, UpkeepSettings
from flexpert.testing import assert_close, run_ranks


def work(rank: int | None) -> tuple[torch.Tensor, dict[str, float]]:
    torch.manual_seed(0)
    router = {"name": "linear", "scoring": "sigmoid", "selection_bias": True}
    moe = MoE(MoEConfig(model_dim=8, hidden_dim=8, num_experts=4, top_k=2, router=router))
    upkeep = RoutingUpkeep(moe, UpkeepSettings(balance_weight=0.0))
    batch = torch.randn(2, 15, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for x in batch if rank is None else batch[rank : rank + 1]:
            with upkeep.watching():
                moe(x)
            upkeep.observe()
            upkeep.close()
        upkeep.step()
    figures, _ = upkeep.figures()
    return moe.router.selection_bias, {name: float(value) for name, value in figures.items()}


def on_a_rank() -> tuple[list[float], dict[str, float]]:
    bias, figures = work(torch.distributed.get_rank())
    return bias.tolist(), figures


def test_ranks_are_as_one_process():
    want_bias, want = work(None)
    assert want_bias.abs().max() > 0.0015  # both steps went one way
    for bias, figures in run_ranks(on_a_rank, 2):
        assert_close(torch.tensor(bias), want_bias, 1e-6)
        assert figures.keys() == want.keys()
        for name, value in want.items():
            assert abs(figures[name] - value) < 1e-5, name
