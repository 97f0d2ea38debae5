from __future__ import annotations

import pytest
import torch

from flexpert import InputError, MoE, MoEConfig
from flexpert.monitor.routing_record import RoutingRecord
from flexpert.monitor.routing_table import routing_table


def layer(router, **options):
    torch.manual_seed(0)
    config = MoEConfig(model_dim=8, hidden_dim=8, num_experts=4, router=router, losses=(), **options)
    return MoE(config)


def test_a_router_without_choices_of_tokens_is_counted_by_rows():
    """Expert choice: an expert takes tokens, and a token may get none or several."""
    moe, record = layer("expert_choice", capacity_factor=1.0), RoutingRecord("moe")
    pairs, load, served = torch.zeros(4, 4, dtype=torch.int64), [0] * 4, 0
    for x in torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1)):
        _, info = moe(x, return_info=True)
        record.add(info.routing, info.stats)
        taken = [set() for _ in range(10)]
        first = 0
        for expert, rows in enumerate(info.routing.counts_E.tolist()):
            for unit in info.routing.unit_N[first : first + rows].tolist():
                taken[unit].add(expert)
            first += rows
            load[expert] += rows
        for experts in taken:
            served += bool(experts)
            for a in experts:
                for b in experts:
                    pairs[a, b] += 1
    report = record.report()
    assert report["load"] == report["selected"] == load
    assert report["coactivation"] == pairs.tolist()
    assert report["unserved"] == 20 - served > 0
    assert report["drop_rate"] == 0


def test_soft_routing_is_refused():
    _, info = layer("soft")(torch.randn(2, 8, 8), return_info=True)
    with pytest.raises(InputError, match="moe routes softly"):
        RoutingRecord("moe").add(info.routing, info.stats)


def test_the_table_draws_many_experts_as_bars():
    report = {
        "layer": "many", "tokens": 20, "experts": 20, "load": [2] * 18 + [4, 0], "entropy": 1.5,
        "max_violation": 1.0, "idle": 1, "drop_rate": 0.25,
        "coactivation": [[4 if a == b else 2 * (a + b == 1) for a in range(20)] for b in range(20)],
    }  # fmt: skip
    lines = routing_table([report]).splitlines()
    assert lines[1].split() == ["many", "20", "20", "1.500", "1.00", "1", "25.0%", "0+1", "10.0%", "(x2.5)"]
    assert lines[-1] == "many   " + "▄" * 18 + "█ " + "  0.00 to 2.00"
