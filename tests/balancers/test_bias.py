"""Balance by a bias: it works, it stays in fp32, and it moves by its steps alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flexpert import BiasBalancer, ConfigError, InputError, MoE, MoEConfig, RoutingContext, routing_scope
from tests.ranks import run_ranks

D, E = 8, 6


def make_layer(top_k=2, **router):
    torch.manual_seed(0)
    spec = {"name": "linear", "scoring": "sigmoid", "selection_bias": True, **router}
    return MoE(
        MoEConfig(model_dim=D, hidden_dim=4, num_experts=E, top_k=top_k, router=spec, renormalize=True)
    )


def collapse(layer):
    """All tokens prefer the first experts."""
    with torch.no_grad():
        layer.router.weight.mul_(0.3)
        layer.router.weight[:, 0] += torch.linspace(1, -1, E)


def data(tokens=600):
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 2.0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "rate"), [("sign", 0.004), ("proportional", 0.02)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_collapsed_router_becomes_balanced(top_k, rule, rate, dtype):
    layer, x = make_layer(top_k), data()
    collapse(layer)
    layer.to(dtype)
    balancer = BiasBalancer(layer, rate=rate, rule=rule)
    violations = []
    for _ in range(250):
        _, info = layer(x.to(dtype), return_info=True)
        violations.append(float(info.stats.max_violation))
        balancer.observe({("", 0): info.stats})
        balancer.step()
    assert violations[0] > 1.5
    assert max(violations[-20:]) < 0.25
    assert layer.router.selection_bias.dtype == torch.float32


def test_step_moves_by_the_rate_against_the_load():
    layer = make_layer(1)
    collapse(layer)
    _, info = layer(data(), return_info=True)
    load = info.stats.selected_E
    balancer = BiasBalancer(layer, rate=0.125)
    balancer.observe({("", 0): info.stats})
    assert layer.router.selection_bias.count_nonzero() == 0
    balancer.step()
    assert torch.equal(layer.router.selection_bias, 0.125 * (load.mean() - load).sign())
    moved = layer.router.selection_bias.clone()
    balancer.step()  # nothing was seen since
    assert torch.equal(layer.router.selection_bias, moved)

    layer.router.selection_bias.zero_()
    balancer = BiasBalancer(layer, rate=0.125, rule="proportional")
    balancer.observe({("", 0): info.stats})
    balancer.step()
    torch.testing.assert_close(layer.router.selection_bias, 0.125 * (load.mean() - load) / load.mean())


def test_micro_batches_are_summed():
    x = data(60)
    whole, parts = make_layer(), make_layer()
    for layer, batches in ((whole, [x]), (parts, x.split(20))):
        balancer = BiasBalancer(layer, rule="proportional")
        for batch in batches:
            balancer.observe({("", 0): layer(batch, return_info=True)[1].stats})
        balancer.step()
    torch.testing.assert_close(whole.router.selection_bias, parts.router.selection_bias)
    assert whole.router.selection_bias.count_nonzero() > 0


def test_tokens_without_experts_move_nothing():
    layer = make_layer()
    balancer = BiasBalancer(layer)
    balancer.observe({("", 0): layer(data()[:0], return_info=True)[1].stats})
    balancer.step()
    assert layer.router.selection_bias.count_nonzero() == 0


class Net(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.router = make_layer()  # a layer may be called what its part is called
        self.blocks = nn.ModuleList([make_layer(), make_layer(selection_bias=False)])
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in (self.router, *self.blocks):
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


def test_names_of_layers_are_those_of_the_scope():
    net = Net()
    balancer = BiasBalancer(net, rate=0.5)
    with routing_scope(net) as scope:
        net(data(50))
    assert {name for name, _ in scope.stats} == {"router", "blocks.0", "blocks.1"}
    balancer.observe(scope.stats)
    balancer.step()
    for layer in (net.router, net.blocks[0]):
        assert layer.router.selection_bias.abs().max() == 0.5
    assert net.blocks[1].router.selection_bias is None


def test_recomputation_is_not_observed_twice():
    biases = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = Net(checkpointed)
        balancer = BiasBalancer(net, rule="proportional")
        for _ in range(2):
            with routing_scope(net, context=RoutingContext(step=0)) as scope:
                net(data(50).requires_grad_()).square().mean().backward()
            balancer.observe(scope.stats)
            balancer.step()
        biases.append([layer.router.selection_bias for layer in (net.router, net.blocks[0])])
    for plain, repeated in zip(*biases, strict=True):
        assert plain.count_nonzero() > 0
        assert torch.equal(plain, repeated)


def test_the_bias_is_part_of_the_state():
    layer = make_layer()
    layer.router.selection_bias.uniform_(-1, 1)
    twin = make_layer()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.router.selection_bias, layer.router.selection_bias)
    assert torch.equal(copy.deepcopy(layer).router.selection_bias, layer.router.selection_bias)


def test_bad_arguments():
    layer = make_layer()
    with pytest.raises(ConfigError, match="rate=0: expected a finite number > 0"):
        BiasBalancer(layer, rate=0)
    with pytest.raises(ConfigError, match="rule='signs': expected 'sign' or 'proportional'"):
        BiasBalancer(layer, rule="signs")
    with pytest.raises(ConfigError, match="model has no router with selection_bias=True"):
        BiasBalancer(nn.Linear(2, 2))
    _, info = layer(data(), return_info=True)
    with pytest.raises(InputError, match=r"stats are of layers \['other'\]; balanced are \[''\]"):
        BiasBalancer(layer).observe({("other", 0): info.stats})


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_ranks_and_micro_batches_move_the_bias_as_one_process_does(rule):
    x = data(60)
    parts = [[x[:7], x[7:30]], [], [x[30:30], x[30:60]]]  # of three ranks, of which one sees nothing
    net = Net()
    with routing_scope(net) as scope:
        net(x)
    alone = BiasBalancer(net, rate=0.3, rule=rule)
    alone.observe(scope.stats)
    alone.step()

    nets = [Net() for _ in parts]  # before the threads start: a net seeds the global generator

    def work(rank, all_reduce):
        own = nets[rank]
        balancer = BiasBalancer(own, rate=0.3, rule=rule)
        for part in parts[rank]:
            with routing_scope(own) as scope:
                own(part)
            balancer.observe(scope.stats)
        balancer.step(all_reduce)

    run_ranks(3, work)
    for own in nets:
        for got, want in ((own.router, net.router), (own.blocks[0], net.blocks[0])):
            assert want.router.selection_bias.count_nonzero() > 0
            assert torch.equal(got.router.selection_bias, want.router.selection_bias)


def test_a_step_over_ranks_ends_what_was_observed():
    layer = make_layer()
    balancer = BiasBalancer(layer)
    balancer.observe({("", 0): layer(data(), return_info=True)[1].stats})
    balancer.step(lambda load: load)
    moved = layer.router.selection_bias.clone()
    assert moved.count_nonzero() > 0
    balancer.step(lambda load: load)
    assert torch.equal(layer.router.selection_bias, moved)
