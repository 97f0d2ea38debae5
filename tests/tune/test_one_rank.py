"""A tuner on one process: what it chooses among computes the same, and the fastest of it runs."""

from __future__ import annotations

import copy

import pytest
import torch

from flexpert import MoE, MoEConfig, ops, routing_scope
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.plan import KERNELS, ExecutionPlan
from flexpert.testing import assert_close
from flexpert.tune import Tuner, TunerSettings, Workload, attach, cost_of, dictionary_path
from flexpert.tune.report import table
from tests.tune.cases import machine_of
from tests.tune.tuning import Clock

PADDED = ExecutionPlan(capacity="padded")


def make_model(layers=1, **options):
    torch.manual_seed(0)
    settings = {"model_dim": 32, "hidden_dim": 32, "num_experts": 4, "top_k": 2, "capacity_factor": 1.25}
    config = MoEConfig(**{**settings, **options})
    return torch.nn.Sequential(*(MoE(config) for _ in range(layers)))


def gradients(layer, x, plan):
    """Output and all gradients under a plan."""
    x = x.detach().requires_grad_()
    y = layer(x, plan=plan)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("capacity_factor", [None, 0.5, 4.0])
@pytest.mark.parametrize("expert", ["mlp", "glu"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_plan_computes_the_same(expert, bias, capacity_factor):
    (layer,) = make_model(expert=expert, expert_bias=bias, capacity_factor=capacity_factor).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(9, 32, dtype=torch.float64)
    with ops.use_backend("reference"):
        want = gradients(layer, x, None)
    for plan in [*(ExecutionPlan(kernel=kernel) for kernel in KERNELS), PADDED]:
        for found, wanted in zip(gradients(layer, x, plan), want, strict=True):
            assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_plan_in_training_dtypes(dtype):
    (layer,) = make_model().to(dtype)
    x = torch.randn(64, 32, dtype=dtype)
    want = gradients(layer, x, None)
    for kernel in KERNELS:
        for found, wanted in zip(gradients(layer, x, ExecutionPlan(kernel=kernel)), want, strict=True):
            assert_close(found, wanted)
    for found, wanted in zip(gradients(layer, x, PADDED), want, strict=True):
        assert_close(found, wanted)


def test_a_nan_stays_in_its_token_in_padded_buffers():
    (layer,) = make_model(capacity_factor=4.0)
    x = torch.randn(6, 32)
    want = layer(x, plan=PADDED)
    x[2] = torch.nan
    got = layer(x, plan=PADDED)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], want[others])
    assert layer(torch.empty(0, 32), plan=PADDED).shape == (0, 32)


def test_backward_keeps_to_the_kernel_of_forward(monkeypatch):
    """Also when it runs after the call's plan has ended."""
    ran = []
    portable = ops.select.PORTABLE
    kernels = {
        name: (lambda *a, name=name, f=f, **k: (ran.append(name), f(*a, **k))[1])
        for name, f in portable.kernels.items()
    }
    noted = ops.select.Backend(name="noted", kernels=kernels, verify=portable.verify)
    monkeypatch.setattr(ops.select, "BACKENDS", [portable, noted])
    monkeypatch.setattr(ops.select, "_live", {})
    (layer,) = make_model(capacity_factor=None)
    x = torch.randn(8, 32)
    routing = layer.router(x, RoutingContext().for_tokens((8,)))
    with ops.wanting("noted"):
        y = layer.experts.fused(x, routing)
    assert ran == ["grouped_mlp"]
    y.sum().backward()
    assert ran == ["grouped_mlp", "grouped_mlp_backward"]
    layer(x).sum().backward()
    assert len(ran) == 2


def train(model, tuner, truth, steps=150, tokens=40):
    """Steps that take, by the plan of the first layer, so many seconds; the plans that ran."""
    plans = []
    for _ in range(steps):
        with tuner.step():
            model(torch.randn(tokens, 32)).sum().backward()
            plan = next(iter(tuner.plans.values()))
            tuner._clock.spend(truth(plan), noise=0.01)
        plans.append(plan)
        model.zero_grad()
    return plans


def truth(plan):
    """Portable kernels are the fastest on this made-up machine."""
    return 1.0 if plan.kernel == "portable" else 1.2


def make_tuner(cost=None, **settings):
    return Tuner(cost or cost_of(), TunerSettings(**settings), clock=Clock(0))


def test_the_fastest_kernel_wins_and_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path))
    model = make_model(layers=2)
    monkeypatch.setattr(ops.select, "BACKENDS", [_twin("native"), ops.select.PORTABLE])
    path = dictionary_path(None)
    tuner = make_tuner()
    assert attach(model, tuner, dictionary=path) == ["0.experts", "1.experts"]
    plans = train(model, tuner, truth)
    assert plans[-1] == ExecutionPlan(kernel="portable")
    (bucket,) = tuner.report()["buckets"]
    assert bucket["settled"]
    assert "faster than the first choice" in bucket["why"]
    assert "portable" in table(bucket)
    tuner.save(path)
    again = make_tuner()
    model = make_model(layers=2)
    attach(model, again, dictionary=path)
    assert train(model, again, truth, steps=5)[1:] == [ExecutionPlan(kernel="portable")] * 4
    assert again.trials == 0


def _twin(name):
    """The portable kernels under another name, so that the test does not depend on a compiler."""
    portable = ops.select.PORTABLE
    return ops.select.Backend(name=name, kernels=portable.kernels, verify=portable.verify)


def test_a_plan_that_slows_down_is_tuned_anew():
    model, tuner = make_model(), make_tuner()
    attach(model, tuner)
    plans = train(model, tuner, lambda plan: 1.0 if plan.kernel == "auto" and plan != PADDED else 1.5)
    assert plans[-1] == ExecutionPlan()
    # From now on buffers of equal size are better: the winner's time alone tells that something changed.
    plans = train(model, tuner, lambda plan: 1.1 if plan == PADDED else 1.6)
    assert plans[-1] == PADDED
    assert tuner.report()["buckets"][0]["retuned"] == 1


def test_deterministic_tries_nothing():
    model, tuner = make_model(), make_tuner(deterministic=True)
    attach(model, tuner)
    assert set(train(model, tuner, truth, steps=20)) == {ExecutionPlan()}
    assert tuner.trials == 0


def test_plans_of_calls_and_scopes_win(monkeypatch):
    model, tuner = make_model(capacity_factor=None), make_tuner()
    attach(model, tuner)
    asked = []
    monkeypatch.setattr(tuner, "plan_for", lambda *facts: asked.append(facts) or ExecutionPlan())
    x = torch.randn(8, 32)
    model(x)
    model[0](x, plan="auto")
    assert [facts[0] for facts in asked] == ["0.experts"] * 2
    assert sum(asked[0][1]) == 16
    assert asked[0][3] == 8
    with routing_scope(model, plan=PADDED):
        model(x)
    model[0](x, plan=ExecutionPlan(kernel="separate"))
    copy.deepcopy(model)(x)  # a copy is not this tuner's
    assert len(asked) == 2


def test_candidates_follow_from_the_bank():
    def kernels(recompute=False):
        model, tuner = make_model(), make_tuner()
        model[0].experts.recompute = recompute
        attach(model, tuner)
        plans = next(iter(tuner.layers.values())).plans
        return [plan.kernel for plan in plans], PADDED in plans

    names, padded = kernels()
    assert names[0] == "auto"
    assert {"recompute", "separate"} < set(names)
    assert padded
    names, padded = kernels(recompute=True)
    assert "recompute" not in names  # it is on, to save memory: nothing that keeps more is tried
    assert "separate" not in names
    assert not padded


def test_the_model_counts_what_is_computed():
    tuner = make_tuner()
    attach(make_model(), tuner)
    (layer,) = tuner.layers.values()
    workload = Workload.uniform(layer.shape, 64, capacity=32)
    for cost in (cost_of(), cost_of(machine_of())):
        plain = cost(layer.shape, ExecutionPlan(), workload)
        assert cost(layer.shape, ExecutionPlan(kernel="recompute"), workload) == pytest.approx(plain * 7 / 6)
        assert cost(layer.shape, ExecutionPlan(kernel="portable"), workload) == plain
    assert cost_of()(layer.shape, PADDED, workload) == 2 * cost_of()(layer.shape, ExecutionPlan(), workload)


def test_models_without_a_choice_are_refused():
    with pytest.raises(ConfigError, match="no MoE layer with a bank of equal experts"):
        attach(torch.nn.Linear(2, 2), make_tuner())
    with pytest.raises(ConfigError, match="kernel='fast', expected one of auto, native"):
        ExecutionPlan(kernel="fast")
