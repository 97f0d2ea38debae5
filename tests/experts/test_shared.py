"""The shared expert."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from flexpert import ConfigError, MoE, MoEConfig, RoutingContext
from flexpert.experts import ExpertBatch, GLUExperts, MLPExperts, SharedExpert
from flexpert.testing import assert_close

D, F = 4, 6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_is_the_sum_of_experts_of_one_size(count, gated, bias):
    torch.manual_seed(0)
    shared = SharedExpert(count=count, gated=gated, gate=False, model_dim=D, hidden_dim=F, bias=bias).double()
    for parameter in shared.parameters():
        torch.nn.init.normal_(parameter)
    kind = GLUExperts if gated else MLPExperts
    parts = kind(num_experts=count, model_dim=D, hidden_dim=F, bias=bias).double()
    whole = shared.expert
    with torch.no_grad():
        parts.w1.copy_(torch.stack(whole.w1[0].split(F, -2)))
        parts.w2.copy_(torch.stack(whole.w2[0].split(F, -1)))
        if bias:
            parts.b1.copy_(torch.stack(whole.b1[0].split(F, -1)))
            parts.b2.copy_(whole.b2.expand(count, D) / count)
    x = torch.randn(5, D, dtype=torch.float64)
    rows = ExpertBatch(rows_ND=x.repeat(count, 1), counts_E=torch.tensor([5] * count), unit_N=None)
    assert_close(shared(x), parts(rows).view(count, 5, D).sum(0))


def test_gate_weighs_each_token():
    shared = SharedExpert(count=1, gated=False, gate=True, model_dim=D, hidden_dim=F).double()
    x = torch.randn(5, D, dtype=torch.float64)
    y = shared(x)
    torch.nn.init.zeros_(shared.gate.weight)
    half = shared(x)
    assert not torch.allclose(y, half)
    shared.gate = None
    assert_close(half, shared(x) / 2)


@pytest.mark.parametrize("gated", [False, True])
def test_recomputes(gated):
    options = {"count": 2, "gated": gated, "gate": True, "model_dim": D, "hidden_dim": F, "bias": True}
    shared, again = (SharedExpert(**options, recompute=flag).double() for flag in (False, True))
    again.load_state_dict(shared.state_dict())
    x = torch.randn(50, D, dtype=torch.float64, requires_grad=True)
    saved, results = [], []
    with saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = again(x)
    assert not any(len(shape) == 2 and shape[0] >= 50 and shape[1] >= F for shape in saved)
    for one, y_TO in ((shared, shared(x)), (again, y)):
        results.append([y_TO, *torch.autograd.grad(y_TO.square().sum(), [x, *one.parameters()])])
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


def test_is_added_for_every_token_also_dropped_and_padding_ones():
    torch.manual_seed(0)
    config = MoEConfig(model_dim=D, hidden_dim=F, num_experts=3, num_shared_experts=2, output_dim=2)
    layer, x = MoE(config).double(), torch.randn(2, 7, D, dtype=torch.float64)
    y = layer(x, context=RoutingContext(mask=torch.zeros(2, 7, dtype=torch.bool)))
    assert_close(y.flatten(0, 1), layer.shared(x.flatten(0, 1)))
    assert y.shape == (2, 7, 2)


def test_follows_the_kind_of_the_first_expert():
    def shared_of(expert, **options):
        config = MoEConfig(
            model_dim=D,
            hidden_dim=F,
            num_experts=2,
            num_shared_experts=1,
            expert=expert,
            expert_bias="b1",
            **options,
        )
        return config.build().shared.expert

    assert isinstance(shared_of("glu"), GLUExperts)
    assert isinstance(shared_of([{"name": "glu"}, "zero"]), GLUExperts)
    assert not isinstance(shared_of("mlp"), GLUExperts)
    bank = shared_of("mlp", activation="relu")
    assert (bank.activation, bank.b1 is not None, bank.b2) == ("relu", True, None)


def test_counts():
    config = MoEConfig(
        model_dim=D, hidden_dim=F, num_experts=3, num_shared_experts=2, shared_gate=True, expert="glu"
    )
    shared = config.build().shared
    assert shared.flops_per_token() == 2 * 3 * D * 2 * F + 2 * D


def test_none_without_a_count():
    config = MoEConfig(model_dim=D, hidden_dim=F, num_experts=3)
    assert config.build().shared is None
    with pytest.raises(ConfigError, match="shared_gate=True needs num_shared_experts >= 1"):
        MoEConfig(model_dim=D, hidden_dim=F, num_experts=3, shared_gate=True)
    with pytest.raises(ConfigError, match="count=0: expected an integer >= 1"):
        SharedExpert(count=0, gated=False, gate=False, model_dim=D, hidden_dim=F)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, gate):
    shared = SharedExpert(count=1, gated=True, gate=gate, model_dim=16, hidden_dim=16)
    x = torch.randn(5, 16).to(dtype)
    assert shared(x).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = shared(x)
    assert y.dtype == dtype
    assert_close(y, shared(x.float()), 3e-2)
