"""Banks of several groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flexpert import ConfigError, MoE, MoEConfig
from flexpert.core.routing import Routing
from flexpert.experts import (
    ConstantExperts,
    CopyExperts,
    ExpertBatch,
    GLUExperts,
    MixedExperts,
    MLPExperts,
    ModuleExperts,
    ZeroExperts,
)
from flexpert.testing import assert_close

D = 4


def make_bank(**more):
    torch.manual_seed(0)
    groups = {
        "mlp": MLPExperts(num_experts=2, model_dim=D, hidden_dim=5, bias=True),
        "copy": CopyExperts(num_experts=1, model_dim=D),
        "glu": GLUExperts(num_experts=3, model_dim=D, hidden_dim=3),
        "constant": ConstantExperts(num_experts=1, model_dim=D),
        **more,
    }
    return MixedExperts(groups).double()


def alone(bank, group, slot, rows):
    """Rows by one expert of one group, called by itself."""
    counts = torch.zeros(bank.get_submodule(group).num_experts, dtype=torch.int64)
    counts[slot] = len(rows)
    return bank.get_submodule(group)(ExpertBatch(rows_ND=rows, counts_E=counts, unit_N=None))


PLACES = [("mlp", 0), ("mlp", 1), ("copy", 0), ("glu", 0), ("glu", 1), ("glu", 2), ("constant", 0)]


@pytest.mark.parametrize("slots", [None, [6, -1, 0, 3, 5, 2, 1]])
def test_each_group_computes_its_slots(slots):
    bank, counts = make_bank(), [2, 1, 3, 0, 2, 1, 2]
    rows = torch.randn(11, D, dtype=torch.float64)
    slot_E = None if slots is None else torch.tensor(slots)
    y = bank(ExpertBatch(rows_ND=rows, counts_E=torch.tensor(counts), unit_N=None, slot_E=slot_E))
    want = [
        torch.zeros_like(part) if slot < 0 else alone(bank, *PLACES[slot], part)
        for slot, part in zip(slots or range(7), rows.split(counts), strict=True)
    ]
    assert_close(y, torch.cat(want))
    weight_N = torch.rand(11, dtype=torch.float64)
    unit_N = torch.randint(5, (11,))
    x = torch.randn(5, D, dtype=torch.float64)
    routing = Routing(unit_N=unit_N, weight_N=weight_N, counts_E=torch.tensor(counts), num_units=5)
    rows = bank(ExpertBatch(rows_ND=x[unit_N], counts_E=routing.counts_E, unit_N=unit_N, slot_E=slot_E))
    fused = torch.zeros(5, D, dtype=torch.float64).index_add(0, unit_N, rows * weight_N[:, None])
    assert_close(bank.fused(x, routing, slot_E), fused)


def test_banks_of_banks():
    inner = make_bank()
    outer = MixedExperts({"first": ZeroExperts(num_experts=2, model_dim=D), "rest": inner}).double()
    rows, counts = torch.randn(9, D, dtype=torch.float64), [1] * 9
    y = outer(ExpertBatch(rows_ND=rows, counts_E=torch.tensor(counts), unit_N=None))
    want = inner(ExpertBatch(rows_ND=rows[2:], counts_E=torch.tensor(counts[2:]), unit_N=None))
    assert_close(y, torch.cat([torch.zeros(2, D, dtype=torch.float64), want]))


def test_what_the_groups_declare():
    bank = make_bank()
    assert (bank.remote, bank.sliceable, bank.row_independent, bank.has_fused) == (True, True, True, True)
    modules = ModuleExperts([nn.Linear(D, D)], model_dim=D, row_independent=False)
    bank = make_bank(own=modules)
    assert (bank.remote, bank.sliceable, bank.row_independent, bank.has_fused) == (True, False, False, False)
    assert not MixedExperts({"zero": ZeroExperts(num_experts=1, model_dim=D)}).remote
    assert bank.num_experts == 8
    assert sum(bank.params_of_experts()) == sum(p.numel() for p in bank.parameters())
    assert len(bank.flops_of_experts()) == 8


def test_from_a_config():
    groups = [
        {"name": "mlp", "count": 2},
        {"name": "mlp", "label": "wide", "count": 1, "hidden_dim": 32},
        {"name": "zero"},
    ]
    layer = MoE(MoEConfig(model_dim=D, hidden_dim=8, num_experts=4, expert=groups))
    assert layer.experts.wide.hidden_dim == 32
    assert {name for name, _ in layer.experts.named_parameters()} == {
        "mlp.w1",
        "mlp.w2",
        "wide.w1",
        "wide.w2",
    }
    assert set(layer.state_dict()) == {
        "router.weight",
        *(f"experts.{g}.{w}" for g in ("mlp", "wide") for w in ("w1", "w2")),
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"name": "mlp", "count": 3}], "expert counts sum to 3, but num_experts=4"),
        ([{"name": "mlp", "count": 2}, {"name": "mlp", "count": 2}], "expert group 'mlp' is named twice"),
        ([{"name": "mlp", "count": 0}, "zero"], "count=0, expected an integer >= 1"),
        ([{"name": "mlp", "count": True}, "zero"], "count=True"),
        ([{"name": "mlp", "width": 3}], "expert 'mlp': unknown option 'width'"),
        ([{"name": "mlpp", "count": 4}], "unknown expert 'mlpp': did you mean 'mlp'"),
        ([{"name": "mlp", "label": "a.b", "count": 4}], "expert group 'a.b': its label names a submodule"),
        ([{"name": "mlp", "label": "forward", "count": 4}], "expert group 'forward'"),
        (
            [{"name": "mlp", "count": 3, "output_dim": 5}, "zero"],
            r"groups differ in \(model_dim, output_dim\)",
        ),
    ],
)
def test_bad_configs(groups, message):
    config = MoEConfig(model_dim=D, hidden_dim=8, num_experts=4, expert=groups)
    with pytest.raises(ConfigError, match=message):
        config.build()


def test_no_groups():
    with pytest.raises(ConfigError, match="groups is empty"):
        MixedExperts({})


def test_meta_construction_and_loading():
    groups = [{"name": "mlp", "count": 2}, {"name": "copy"}, {"name": "constant"}]
    config = MoEConfig(model_dim=D, hidden_dim=8, num_experts=4, top_k=2, expert=groups)
    layer, x = config.build(), torch.randn(9, D)
    with torch.device("meta"):
        twin = config.build()
    twin.to_empty(device="cpu")
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(twin)(x), layer(x))
