"""The layer as a graph: compiled without breaks or recompilations, exported with a static capacity."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from flexpert import MoE, MoEConfig, RoutingContext, routing_scope
from flexpert.testing import assert_close

D = 8
MIXED = [{"name": "mlp", "count": 3}, "zero", "copy", "constant"]
CASES = {
    "published": {
        "router": {"name": "cosine", "proj_dim": 4, "gate_noise": 1.0},
        "capacity_factor": 1.25,
        "batch_prioritized": True,
        "losses": ["balance", "importance_load"],
    },
    "dropless": {"expert": "glu", "renormalize": True, "num_shared_experts": 1, "losses": ["balance", "z"]},
    "top_p": {
        "router": {
            "name": "linear",
            "selection": "top_p",
            "scoring": "sigmoid",
            "selection_bias": True,
            "input_jitter": 0.1,
        },
        "losses": ["balance", "entropy"],
    },
    "random": {
        "router": {"name": "linear", "selection": "random", "learned_noise": True},
        "capacity_factor": -0.5,
    },
    "hash": {"router": "hash", "combine": "weighted_input"},
    "expert_choice": {"router": "expert_choice"},
    "soft": {"router": "soft"},
    "mixed": {"expert": MIXED, "capacity_factor": 0.0},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, layers=1, **options):
        super().__init__()
        torch.manual_seed(0)
        defaults = {"model_dim": D, "hidden_dim": 10, "num_experts": 6, "top_k": 2, "expert_bias": True}
        config = MoEConfig(**{**defaults, **options})
        self.layers = nn.ModuleList(MoE(config) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def step(net, call, x, context):
    """One training step's output, losses, statistics and gradients."""
    with routing_scope(net, context=context) as scope:
        y = call(x)
        loss = y.square().mean() + sum(term.mean() for term in scope.losses.values())
        grads = torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True)
    leaves = ["x", *(name for name, _ in net.named_parameters())]
    return y, dict(scope.losses), scope.stats, dict(zip(leaves, grads, strict=True))


def assert_same_step(got, want):
    assert_close(got[0], want[0])
    for name, value in want[1].items():
        assert_close(got[1][name], value, name=name)
    assert list(got[2]) == list(want[2])
    for key, stats in want[2].items():
        assert torch.equal(got[2][key].load_E, stats.load_E)
        assert torch.equal(got[2][key].dropped, stats.dropped)
    for name, value in want[3].items():
        if value is None:
            assert got[3][name] is None or got[3][name].count_nonzero() == 0, name
        else:
            assert_close(got[3][name], value, 1e-5, scale=1e-4, name=name)


@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_all_steps_masks_and_scopes(case):
    net = Net(layers=2 if case == "published" else 1, **CASES[case])
    plain = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(2, 7, D, generator=generator).requires_grad_()
        ids = torch.randint(99, (2, 7), generator=generator)
        mask = torch.rand(2, 7, generator=generator) > 0.2
        context = RoutingContext(mask=mask, token_ids=ids, step=torch.tensor(i))
        assert_same_step(step(net, compiled, x, context), step(plain, plain, x, context))
    assert counter.frame_count == 1


def test_noise_follows_the_step_in_a_graph():
    net = Net(router={"name": "linear", "gate_noise": 4.0})
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x, outputs = torch.randn(20, D), []
    for i in (0, 1, 0):
        with routing_scope(net, context=RoutingContext(step=torch.tensor(i))):
            outputs.append(compiled(x))
    assert counter.frame_count == 1
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_numbers_of_tokens_may_change():
    net = Net(capacity_factor=1.0, batch_prioritized=True)
    counter = CompileCounterWithBackend("eager")
    layer = net.layers[0]
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (5, 12, 31, 8):
        x = torch.randn(2, tokens, D)
        facts = {"mask": torch.rand(2, tokens) > 0.3, "expert_mask": torch.rand(2, tokens, 6) > 0.3}
        y = compiled(x, context=RoutingContext(**facts))
        assert_close(y, layer(x, context=RoutingContext(**facts)))
    assert counter.frame_count == 1


def test_overrides_of_a_call():
    layer = Net().layers[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(9, D)
    for overrides in ({}, {"top_k": 3}, {"capacity_factor": 0.5}, {"top_k": 1, "capacity_factor": None}):
        y, info = compiled(x, return_info=True, **overrides)
        want, want_info = layer(x, return_info=True, **overrides)
        assert_close(y, want)
        assert torch.equal(info.routing.unit_N, want_info.routing.unit_N)
        assert_close(info.losses["balance"], want_info.losses["balance"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # what inductor imports
def test_inductor():
    net = Net(capacity_factor=1.0)
    plain, x = copy.deepcopy(net), torch.randn(12, D, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True)
    context = RoutingContext(step=torch.tensor(1))
    assert_same_step(step(net, compiled, x, context), step(plain, plain, x, context))


def test_checkpointing_inside_a_graph():
    net = Net(router={"name": "linear", "gate_noise": 2.0})
    plain, x = copy.deepcopy(net), torch.randn(12, D, requires_grad=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x):
        return x + checkpoint(net.layers[0], x, use_reentrant=False)

    context = RoutingContext(step=torch.tensor(1))
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        assert_same_step(step(net, call, x, context), step(plain, plain, x, context))


@pytest.mark.parametrize(
    "options",
    [
        {"capacity_factor": 1.0, "batch_prioritized": True, "router": {"name": "cosine", "proj_dim": 4}},
        {"capacity_factor": -0.5, "expert": "glu", "num_shared_experts": 1},
        {"router": "expert_choice"},
        {"router": "soft"},
        {},
    ],
)
def test_export(options):
    net = Net(**options).eval()
    x = torch.randn(12, D)
    program = torch.export.export(net, (x,))
    other = torch.randn(12, D)
    assert_close(program.module()(other), net(other))


class Masked(nn.Module):
    """A layer with its mask as an input of the graph."""

    def __init__(self):
        super().__init__()
        self.layer = Net(capacity_factor=0.5).layers[0].eval()

    def forward(self, x, mask):
        return self.layer(x, context=RoutingContext(mask=mask))


def test_export_with_a_mask():
    module = Masked()
    program = torch.export.export(module, (torch.randn(12, D), torch.ones(12, dtype=torch.bool)))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, mask = torch.randn(12, D, generator=generator), torch.rand(12, generator=generator) > 0.4
        assert_close(program.module()(x, mask), module(x, mask))
