from __future__ import annotations

import pytest
import torch

from flexpert import ConfigError, MoE, MoEConfig, RoutingContext
from flexpert.experts import DropoutGLUExperts, DropoutMLPExperts
from flexpert.routers import LinearRouter


def make(dropout, **settings):
    torch.manual_seed(0)
    expert = {"name": "mlp_dropout", "dropout": dropout} if dropout is not None else "mlp"
    return MoE(MoEConfig(model_dim=6, hidden_dim=12, num_experts=3, expert=expert, **settings))


@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_equals_the_plain_bank(training):
    x = torch.randn(11, 6)
    plain, ours = make(None, expert_bias=True).train(training), make(0.0, expert_bias=True).train(training)
    assert torch.equal(plain(x), ours(x))


def test_evaluation_drops_nothing():
    x = torch.randn(11, 6)
    assert torch.equal(make(None).eval()(x), make(0.7).eval()(x))


def test_training_drops_hidden_values_and_rescales_the_others():
    bank = DropoutMLPExperts(num_experts=1, model_dim=64, hidden_dim=64, activation="identity", dropout=0.25)
    moe = MoE(router=LinearRouter(model_dim=64, num_experts=1), experts=bank).train()
    with torch.no_grad():
        bank.w1.copy_(torch.eye(64)[None])  # y is the hidden layer, and the hidden layer is x
        bank.w2.copy_(torch.eye(64)[None])
    x = torch.rand(200, 64) + 1
    y = moe(x)
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.75)
    assert 0.23 < dropped.float().mean() < 0.27  # 12,800 draws: more than five standard deviations each way


def test_gradients_with_dropout_equal_a_naive_loop():
    moe = make(0.5, expert_bias=True).double().train()
    x = torch.randn(9, 6, dtype=torch.float64)
    routing = moe.router(x, RoutingContext())
    rows = x[routing.unit_N]
    torch.manual_seed(7)
    y = moe(x)
    grads = torch.autograd.grad(y.square().sum(), list(moe.experts.parameters()))

    torch.manual_seed(7)
    bank, ids = moe.experts, routing.expert_N()
    pre = torch.stack([bank.w1[e] @ row + bank.b1[e] for e, row in zip(ids, rows, strict=True)])
    hidden = torch.nn.functional.dropout(torch.nn.functional.gelu(pre), 0.5)
    results = torch.stack([bank.w2[e] @ h + bank.b2[e] for e, h in zip(ids, hidden, strict=True)])
    expected = torch.zeros_like(x).index_add(0, routing.unit_N, results * routing.weight_N[:, None])
    torch.testing.assert_close(y, expected)
    naive = torch.autograd.grad(expected.square().sum(), list(bank.parameters()))
    torch.testing.assert_close(grads, naive)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_bad_rate_is_refused(dropout):
    with pytest.raises(ConfigError, match=f"dropout={dropout}"):
        make(dropout)


def test_gated_experts_drop_their_product():
    bank = DropoutGLUExperts(num_experts=1, model_dim=64, hidden_dim=64, activation="identity", dropout=0.25)
    moe = MoE(router=LinearRouter(model_dim=64, num_experts=1), experts=bank).train()
    with torch.no_grad():
        bank.w1.copy_(torch.eye(64).expand(1, 2, 64, 64))  # y is the hidden layer, which is x squared
        bank.w2.copy_(torch.eye(64)[None])
    x = torch.rand(200, 64) + 1
    y = moe(x)
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], x.square()[~dropped] / 0.75)
    assert 0.23 < dropped.float().mean() < 0.27
    torch.testing.assert_close(moe.eval()(x), x.square())


@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_shared_experts_of_a_config_drop_too(kind):
    config = {"model_dim": 6, "hidden_dim": 12, "num_experts": 3, "num_shared_experts": 1}
    moe = MoE(MoEConfig(**config, expert={"name": f"{kind}_dropout", "dropout": 0.3}, shared_hidden_dim=40))
    assert moe.shared.expert.gated == (kind == "glu")
    assert moe.shared.expert.hidden_dim == 40
    x = torch.randn(5, 6)
    assert not torch.equal(moe.shared(x), moe.shared(x))
    assert torch.equal(moe.eval().shared(x), moe.shared(x))
    assert MoE(MoEConfig(**config, expert=kind)).shared.dropout == 0
