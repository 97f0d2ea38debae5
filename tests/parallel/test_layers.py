"""Layers inside models on several ranks: losses, noise, wrappers, sub-groups, experts of one's own."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from flexpert import MoE, MoEConfig, RoutingContext, routing_scope
from flexpert.core.errors import ConfigError
from flexpert.core.layout import ParamLayout
from flexpert.experts import ExpertBank
from flexpert.parallel import ExecutionPlan, clip_grad_norm_, expert_mesh, loss_weight, no_sync, parallelize
from flexpert.parallel.timeline import record_timeline
from flexpert.routers import build_router
from flexpert.testing import assert_close, run_ranks
from tests.parallel.cases import D, make_layer, tokens_of, whole


class Model(nn.Module):
    """Two MoE layers between dense ones."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(5)
        losses = ({"name": "balance", "scope": "global"}, {"name": "z", "scope": "global"})
        config = MoEConfig(
            model_dim=D, hidden_dim=8, num_experts=4, top_k=2, expert_bias=True, losses=losses, **options
        )
        self.first, self.moe, self.middle, self.last = (
            nn.Linear(D, D),
            MoE(config),
            nn.Linear(D, D),
            MoE(config),
        )
        self.double()

    def forward(self, x, checkpointed=False):
        x = torch.tanh(self.first(x))
        x = x + (checkpoint(self.moe, x, use_reentrant=False) if checkpointed else self.moe(x))
        return self.last(torch.tanh(self.middle(x)))


def step(model, x, g, context, scale, plan=None, checkpointed=False, weight=1.0):
    """Loss terms of one backward, and every gradient after it."""
    with routing_scope(model, context=context, plan=plan) as scope:
        y = model(x, checkpointed)
        extra = sum(scope.losses[name].mean() for name in ("balance", "z"))
        ((y * g).sum() * scale * weight + extra).backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return {"output": y.detach(), "losses": extra.detach(), "gradients": gradients}


def reference(counts, options, context=None):
    x, g = tokens_of(counts)
    return step(Model(**options), x, g, context, 1.0 / len(counts))


def dense_mesh(shape):
    """A mesh of the dense layers, with other factors than the experts'."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")) if shape else None


def model_on_ranks(counts, options, plans, settings):
    rank = dist.get_rank()
    results = []
    for plan in plans:
        model = Model(**options)
        parallelize(
            model,
            expert_mesh(4, **settings.get("mesh", {})),
            dense=settings.get("dense", "ddp"),
            dense_mesh=dense_mesh(settings.get("dense_mesh")),
            verify=False,
        )
        x, g = (part.split(counts)[rank] for part in tokens_of(counts))
        first = sum(counts[:rank])
        context = RoutingContext(step=1, samples=(first, first + counts[rank]))
        results.append(
            step(model, x, g, context, 1.0, ExecutionPlan(**plan), settings.get("checkpointed", False))
        )
    return results


def check(counts, plans, options=None, **settings):
    options = options or {}
    context = RoutingContext(step=1, samples=(0, sum(counts)))
    want = reference(counts, options, context)
    ranks = run_ranks(model_on_ranks, len(counts), counts, options, plans, settings)
    for i, plan in enumerate(plans):
        results = [rank[i] for rank in ranks]
        assert_close(torch.cat([r["output"] for r in results]), want["output"], 1e-11, name=f"{plan} output")
        for result in results:
            assert_close(result["losses"], want["losses"], 1e-12, name=f"{plan} losses")
            assert result["gradients"].keys() == want["gradients"].keys()
            for name, value in want["gradients"].items():
                assert_close(result["gradients"][name], value, 1e-10, scale=1e-3, name=f"{plan} {name}")


BOTH = [{"r": 0}, {"r": 1, "degree": 2}]


@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
@pytest.mark.parametrize("counts", [[4, 3], [0, 6]], ids=str)
def test_models_with_global_losses(dense, counts):
    check(counts, BOTH, dense=dense)


def test_dense_and_expert_meshes_of_other_factors():
    check([2, 3, 1, 4], BOTH, dense="fsdp", dense_mesh=(2, 2), mesh={"slices": 2})


def test_gate_noise_does_not_depend_on_the_ranks():
    check([4, 3], BOTH, options={"router": {"name": "linear", "gate_noise": 1.0, "input_jitter": 0.1}})


def test_activation_checkpointing():
    check([4, 3], [*BOTH, {"r": 1, "capacity": "padded"}], checkpointed=True)


def test_replicas_and_shared_experts():
    check([2, 3, 0, 4], BOTH, options={"num_shared_experts": 1}, mesh={"replicas": 2})


def in_sub_groups(counts):
    """Two meshes of two ranks side by side, each with a batch of its own."""
    rank = dist.get_rank()
    mesh = expert_mesh(4, ranks=[0, 2] if rank in (0, 2) else [1, 3])
    model = Model()
    parallelize(model, mesh, dense="ddp")
    x, g = (part.split(counts)[rank // 2] for part in tokens_of(counts))
    return step(model, x * (1 + rank % 2), g, None, 1.0, ExecutionPlan(degree=2))


def test_sub_groups():
    counts = [3, 4]
    results = run_ranks(in_sub_groups, 4, counts)
    for half in (0, 1):
        x, g = tokens_of(counts)
        want = step(Model(), x * (1 + half), g, None, 0.5)
        for rank in (half, half + 2):
            for name, value in want["gradients"].items():
                assert_close(results[rank]["gradients"][name], value, 1e-10, scale=1e-3, name=name)


class LowRank(ExpertBank):
    """A bank of one's own: y = (x a) b + c, a sum over slices of the rank; c is whole and added once."""

    sliceable = True

    def __init__(self, num_experts, rank=4):
        super().__init__(num_experts=num_experts, model_dim=D, output_dim=D)
        self.a = nn.Parameter(torch.randn(num_experts, D, rank))
        self.b = nn.Parameter(torch.randn(num_experts, rank, D))
        self.c = nn.Parameter(torch.randn(num_experts, D))
        self.gain = nn.Parameter(torch.randn(D))

    def layout(self):
        cut = {"a": ParamLayout(slice_dim=2), "b": ParamLayout(slice_dim=1)}
        return cut | {"c": ParamLayout(slice_dim=None, once=True)}

    def forward(self, batch):
        expert_N = torch.repeat_interleave(torch.arange(len(batch.counts_E)), batch.counts_E)
        rows_NR = torch.einsum("nd,ndr->nr", batch.rows_ND * self.gain, self.a[expert_N])
        return torch.einsum("nr,nrd->nd", rows_NR, self.b[expert_N]) + self.c[expert_N]


class Mixing(ExpertBank):
    """Rows of one expert see each other: y = x - mean of the expert's rows."""

    row_independent = False

    def forward(self, batch):
        return torch.cat([rows - rows.mean(0) for rows in batch.rows_ND.split(batch.counts_E.tolist())])


def layer_with(bank):
    torch.manual_seed(2)
    config = MoEConfig(model_dim=D, hidden_dim=8, num_experts=bank.num_experts, top_k=2)
    return MoE(router=build_router(config), experts=bank).double()


def with_low_rank(counts, plans):
    torch.manual_seed(1)
    layer = layer_with(LowRank(4))
    parallelize(layer, expert_mesh(4, slices=2), dense="ddp")
    x, g = (part.split(counts)[dist.get_rank()] for part in tokens_of(counts))
    results = []
    for plan in plans:
        layer.zero_grad()
        y = layer(x, plan=ExecutionPlan(**plan))
        (y * g).sum().backward()
        results.append((y.detach(), {name: whole(p.grad) for name, p in layer.named_parameters()}))
    return results


def test_a_bank_of_ones_own():
    counts, plans = [5, 4], [{"r": 0}, {"r": 1}, {"r": 2, "degree": 2}]
    torch.manual_seed(1)
    layer = layer_with(LowRank(4))
    x, g = tokens_of(counts)
    want = layer(x)
    ((want * g).sum() / 2).backward()
    for i, plan in enumerate(plans):
        results = [rank[i] for rank in run_ranks(with_low_rank, 2, counts, plans)]
        assert_close(torch.cat([y for y, _ in results]), want, 1e-11, name=str(plan))
        for _, gradients in results:
            for name, parameter in layer.named_parameters():
                assert_close(gradients[name], parameter.grad, 1e-10, name=f"{plan} {name}")


def refusals():
    said = {}

    def note(name, call):
        try:
            call()
        except ConfigError as error:
            said[name] = str(error)

    mesh = expert_mesh(4, slices=2)
    note("mixing", lambda: parallelize(layer_with(Mixing(num_experts=4, model_dim=D, output_dim=D)), mesh))
    modules = parallelize(make_layer("modules"), mesh)
    x = torch.randn(2, D, dtype=torch.float64)
    note("modules", lambda: modules(x, plan=ExecutionPlan(r=2)))
    note("r", lambda: modules(x, plan=ExecutionPlan(r=3)))
    note("hidden", lambda: parallelize(make_layer(hidden_dim=7), mesh))
    note("experts", lambda: parallelize(make_layer(num_experts=3), expert_mesh(2)))
    note("mesh", lambda: expert_mesh(3))
    note("slices", lambda: expert_mesh(4, slices=3))
    note("twice", lambda: parallelize(parallelize(make_layer(), mesh), mesh))
    note("2dh", lambda: expert_mesh(4, ranks_per_node=3).check(ExecutionPlan(algorithm="2dh")))
    note("none", lambda: parallelize(nn.Linear(2, 2), mesh))
    return said


def test_plans_and_shapes_that_cannot_run_are_refused():
    for said in run_ranks(refusals, 2):
        assert "row_independent=False" in said["mixing"]
        assert "sliceable=False" in said["modules"]
        assert "r=3" in said["r"]
        assert "0, 1, 2" in said["r"]
        assert "experts.w1" in said["hidden"]
        assert "multiple of 2" in said["hidden"]
        assert "3 experts" in said["experts"]
        assert "legal are [1, 3" in said["mesh"]
        assert "legal values are [1, 2]" in said["slices"]
        assert "already" in said["twice"]
        assert "no MoE layer" in said["none"]


def accumulated(counts, dense):
    """Two micro-batches, the first without averaging; then the norm, and the weight of unequal shares."""
    rank = dist.get_rank()
    mesh = expert_mesh(4, replicas=2)
    results = []
    for deferred in (False, True):
        model = parallelize(Model(), mesh, dense=dense)
        x, g = (part.split(counts)[rank] for part in tokens_of(counts))
        if deferred:
            with no_sync(model):
                (model(x) * g).sum().backward()
        else:
            (model(x) * g).sum().backward()
        (model(x + 1) * g).sum().backward()
        results.append([whole(p.grad) for p in model.parameters()] + [clip_grad_norm_(model, 1e9)])
    return results, loss_weight(counts[rank], mesh)


@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_accumulation_without_sync(dense):
    counts = [3, 1]
    model = Model()
    x, g = tokens_of(counts)
    (((model(x) + model(x + 1)) * g).sum() / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    want = [p.grad for p in model.parameters()] + [norm]
    for (every, deferred), weight in (ranks := run_ranks(accumulated, 2, counts, dense)):
        for value, a, b in zip(want, every, deferred, strict=True):
            assert_close(a.double(), value, 1e-6, scale=1e-3)
            assert_close(b.double(), value, 1e-6, scale=1e-3)
        assert weight in (1.5, 0.5)
    assert sum(weight for _, weight in ranks) == 2


def timed(degree):
    layer = parallelize(make_layer(dtype=torch.float32), expert_mesh(4))
    bank = layer.experts
    compute = type(bank).rows

    def slow(self, *args):
        import time

        time.sleep(0.05)
        return compute(self, *args)

    type(bank).rows = slow
    try:
        x = torch.randn(40000, D, requires_grad=True)
        with record_timeline() as timeline:
            layer(x, plan=ExecutionPlan(degree=degree)).sum().backward()
    finally:
        type(bank).rows = compute
    events = sorted(timeline.events, key=lambda event: event.begin)
    return timeline.overlap_seconds(), [(e.name, e.kind, e.chunk, e.begin, e.end) for e in events]


def test_chunks_travel_while_others_are_computed():
    for overlap, events in run_ranks(timed, 2, 3):
        assert overlap > 0
        forward = [e for e in events if e[0] == "experts"]
        assert [chunk for _, _, chunk, _, _ in forward] == [0, 1, 2]
        # The last chunk is on its way before the first is computed, forward and back.
        for name in ("experts", "experts backward"):
            first = next(begin for n, _, chunk, begin, _ in events if n == name and chunk == 0)
            sent = [b for n, k, chunk, b, _ in events if k == "communication" and chunk == 2 and b < first]
            assert sent, name


def rounded(codec):
    layer = parallelize(make_layer(dtype=torch.float32), expert_mesh(4))
    x, g = (part.split([5, 4])[dist.get_rank()] for part in tokens_of([5, 4], torch.float32))
    x = x.requires_grad_()
    y = layer(x, plan=ExecutionPlan(codec=codec, degree=2))
    (y * g).sum().backward()
    return y.detach(), x.grad, layer.experts.w1.grad.full_tensor()


@pytest.mark.parametrize(("codec", "tolerance"), [("bf16", 2**-7), ("fp8", 2**-3)])
def test_codecs_round_within_their_bounds(codec, tolerance):
    exact, near = run_ranks(rounded, 2, "none"), run_ranks(rounded, 2, codec)
    for a, b in zip(exact, near, strict=True):
        for want, got in zip(a, b, strict=True):
            assert_close(got, want, tolerance)
            assert not torch.equal(got, want), "nothing was rounded"


def half_precision(counts, how):
    """A step in bf16: experts and rows in it, parameters and their gradients in fp32."""
    rank = dist.get_rank()
    mesh = expert_mesh(4)
    model = Model().float()
    policy = torch.bfloat16 if how == "fsdp" else None
    parallelize(model, mesh, dense=how, mixed_precision=policy, verify=how == "ddp")
    x, g = (part.float().split(counts)[rank] for part in tokens_of(counts))
    mesh.traffic.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "ddp"):
        y = model(x)
    sent = mesh.traffic.snapshot()["all_to_all"]
    (y.float() * g).sum().backward()
    return y.float().detach(), sent, {name: whole(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_half_precision(how):
    counts = [6, 5]
    model = Model().float()
    x, g = (part.float() for part in tokens_of(counts))
    y = model(x)
    ((y * g).sum() / 2).backward()
    results = run_ranks(half_precision, 2, counts, how)
    assert_close(torch.cat([y for y, _, _ in results]), y.detach(), 3e-2)
    for _, _, gradients in results:
        for name, parameter in model.named_parameters():
            assert gradients[name].dtype is torch.float32
            assert_close(gradients[name], parameter.grad, 0.1, scale=0.1, name=name)


def compiled(counts):
    layer = parallelize(make_layer(), expert_mesh(4))
    x = tokens_of(counts)[0].split(counts)[dist.get_rank()].requires_grad_()
    want = layer(x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Where a graph breaks, dynamo asks a tensor that is no leaf for its .grad.
        warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)
        got = torch.compile(layer, backend="aot_eager")(x)
    got.sum().backward()
    return got.detach(), want.detach(), x.grad


def test_inside_a_compiled_model():
    for got, want, gradient in run_ranks(compiled, 2, [4, 3]):
        assert_close(got, want)
        assert gradient.abs().sum() > 0
