"""Unlike modules over ranks: what a rank holds, out and in under the names of one process, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from flexpert import ConfigError, InputError, MoE
from flexpert.core.errors import CheckpointError
from flexpert.experts import ModuleExperts
from flexpert.parallel import (
    ExecutionPlan,
    expert_mesh,
    full_state_dict,
    load_full_state_dict,
    materialize,
    parallelize,
)
from flexpert.parallel.pieces import Pieces
from flexpert.routers import LinearRouter
from flexpert.testing import run_ranks
from tests.parallel.cases import D, unlike

E = 6
MESHES = {1: {}, 2: {"replicas": 2}, 3: {}, 4: {"slices": 2, "replicas": 2}}


def layer_of(experts):
    router = LinearRouter(model_dim=D, num_experts=len(experts), top_k=1)
    return MoE(router=router, experts=ModuleExperts(experts, model_dim=D))


def build(seed, dense=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, D), layer_of(unlike(E))).double()
    if dist.is_initialized():
        parallelize(model, expert_mesh(E, **MESHES[dist.get_world_size()]), dense=dense)
    return model


def held(dense):
    """What is a DTensor, how it lies, and how many numbers of the experts are here."""
    bank = build(1, dense)[1].experts
    tensors = {**dict(bank.named_parameters()), **dict(bank.named_buffers())}
    assert all(isinstance(tensor, DTensor) for tensor in tensors.values())
    assert all(tensor.placements[1] == Shard(0) for tensor in tensors.values())
    frozen = {name for name, tensor in tensors.items() if not tensor.requires_grad}
    return sorted(tensors), sorted(frozen), sum(t.to_local().numel() for t in tensors.values())


def test_each_rank_holds_the_tensors_of_its_experts():
    (names, frozen, whole), *_ = run_ranks(held, 1, None)
    assert names == [
        "buffers_float64",
        "buffers_int64",
        "frozen_float64",
        "matrices_float64",
        "vectors_float64",
    ]
    assert frozen == names[:3]
    for world, dense in ((3, "ddp"), (3, "fsdp"), (4, "fsdp")):
        for result in run_ranks(held, world, dense):
            assert result == (names, frozen, whole // (3 if world == 3 else 1))


def same(got, want):
    return list(got) == list(want) and all(
        torch.equal(got[name], want[name]) and got[name].dtype is want[name].dtype for name in want
    )


def out_and_in(dense, tensors, path):
    exports = [full_state_dict(build(1, dense))]
    for way in (
        lambda model: load_full_state_dict(model, tensors),
        lambda model: load_full_state_dict(model, path),
        lambda model: model.load_state_dict(tensors),
        lambda model: [
            part.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith(f"{i}.")})
            for i, part in enumerate(model)
        ],
    ):
        model = build(2, dense)
        pointers = [p.data_ptr() for p in model[1].experts.parameters()]
        way(model)
        assert pointers == [p.data_ptr() for p in model[1].experts.parameters()]
        exports.append(full_state_dict(model))
    return exports


@pytest.mark.parametrize(("world", "dense"), [(3, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_out_and_in_as_one_process_has_them(tmp_path, world, dense):
    want = build(1).state_dict()
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in want.items()}, path)
    first, *others = run_ranks(out_and_in, world, dense, dict(want), path)
    assert len(first) == 5
    assert all(same(exported, want) for exported in first)
    assert all(exported == {} for exports in others for exported in exports)


def bad_tensors(tensors):
    model = build(2)
    before, name = full_state_dict(model), "1.experts.experts.0.2.weight"
    said = []
    for given in (
        {key: value for key, value in tensors.items() if key != name},
        {**tensors, name: tensors[name][1:]},
    ):
        for way in (load_full_state_dict, type(model).load_state_dict):
            with pytest.raises(CheckpointError) as caught:
                way(model, given)
            said.append(str(caught.value))
    after = full_state_dict(model)  # `load_state_dict` copies what fits, as PyTorch's does
    return said, all(torch.equal(after[key], before[key]) for key in before if "experts.experts" in key)


def test_what_does_not_fit_is_refused():
    for (absent, absent_too, cut, cut_too), unchanged in run_ranks(
        bad_tensors, 1, dict(build(1).state_dict())
    ):
        assert unchanged
        assert "missing: 1.experts.experts.0.2.weight" in absent
        assert "experts.0.2.weight is missing" in absent_too
        assert "1.experts.experts.0.2.weight [5, 8] instead of [6, 8]" in cut
        assert "experts.0.2.weight has shape [5, 8] instead of [6, 8]" in cut_too


def built_on_meta():
    torch.manual_seed(4)
    with torch.device("meta"):
        model = layer_of([nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.LayerNorm(D), nn.Linear(D, D)])
    if not dist.is_initialized():
        return dict(materialize(model).state_dict())
    return full_state_dict(parallelize(model, expert_mesh(4)))


def test_initial_values_do_not_depend_on_the_ranks():
    want = built_on_meta()
    for world in (1, 2, 4):
        assert same(run_ranks(built_on_meta, world)[0], want)


def refusals():
    mesh = expert_mesh(2)
    shared = nn.Linear(D, D)
    tied = nn.Sequential(nn.Linear(D, D), shared)
    banks = {
        "two experts": layer_of([nn.Sequential(nn.ReLU(), shared), shared]),
        "recurrent": layer_of([nn.Linear(D, D), nn.GRU(D, D)]),
        "outside": nn.Sequential(shared, layer_of([nn.Linear(D, D), tied])),
    }
    said = {}
    for name, model in banks.items():
        with pytest.raises(ConfigError) as caught:
            parallelize(model, mesh)
        said[name] = str(caught.value)
    for name, experts in {
        "norm": [nn.Sequential(nn.BatchNorm1d(D)), nn.BatchNorm1d(D)],
        "slices": [nn.Linear(D, D), nn.Identity()],
    }.items():
        layer = parallelize(layer_of(experts), mesh)
        with pytest.raises((ConfigError, InputError)) as caught:
            layer(torch.randn(9, D), plan=ExecutionPlan(r=2 if name == "slices" else 0))
        said[name] = str(caught.value)
    return said


def test_refusals():
    (said,) = run_ranks(refusals, 1)
    assert said["two experts"].startswith("experts 0 and 1 share 'weight'")
    assert said["recurrent"].startswith("expert 1: it is an GRU, which keeps its weights")
    assert "experts.experts.1.1.weight is also 0.weight" in said["outside"]
    assert "writes to its buffers" in said["norm"]
    assert "r=2 on a mesh with 1 slices" in said["slices"]


def test_a_bank_that_holds_its_experts_alone():
    """Without ranks: the stacked form computes what the modules do, a copy of it too."""
    torch.manual_seed(1)
    bank = ModuleExperts(unlike(E), model_dim=D).double()
    other = copy.deepcopy(bank)
    facts = bank.params_of_experts(), bank.flops_of_experts()
    assert other.hold(range(E))
    other = copy.deepcopy(other)
    x, counts = torch.randn(12, D, dtype=torch.float64), torch.tensor([2, 0, 3, 4, 2, 1])
    unit = torch.randperm(12)
    torch.testing.assert_close(other.rows(x, unit, counts), bank.rows(x, unit, counts))
    assert (other.params_of_experts(), other.flops_of_experts()) == facts
    assert list(Pieces(other).places) == list(bank.state_dict())
