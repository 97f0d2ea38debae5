"""The bytes a plan sends are those predicted, exactly, on every kind of link."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.parallel.predict import bytes_of_call
from flexpert.testing import run_ranks
from tests.parallel.cases import make_layer, tokens_of

PLANS = [
    {"r": r, "degree": degree, "algorithm": algorithm, "capacity": capacity, "codec": codec}
    for r, (degree, codec), algorithm, capacity in itertools.product(
        (0, 1, 2), ((1, "none"), (3, "fp8")), ("linear", "2dh"), ("ragged", "padded")
    )
    if r or (degree == 1 and algorithm == "linear")
]


def count(mesh_options, layer_options, counts, verify, kind="mlp"):
    mesh = expert_mesh(4, ranks_per_node=2, **mesh_options)
    layer = make_layer(kind, dtype=torch.float32, **layer_options)
    parallelize(layer, mesh, verify=verify)
    x = tokens_of(counts, torch.float32)[0].split(counts)[dist.get_rank()].requires_grad_()
    results = []
    for settings in PLANS:
        plan = ExecutionPlan(**settings)
        if plan.r not in mesh.legal_r:
            continue
        mesh.traffic.reset()
        y, info = layer(x, plan=plan, return_info=True)
        y.sum().backward()
        measured = mesh.traffic.inside, mesh.traffic.between
        counts_PE = torch.empty(mesh.whole.size, 4, dtype=torch.int64)
        mesh.whole.all_gather(counts_PE.view(-1), info.routing.counts_E)
        capacity = getattr(info.routing, "buffer_capacity", None)
        said = bytes_of_call(
            mesh, layer.experts, plan, counts_PE, dtype=x.dtype, capacity=capacity, verify=verify
        )
        results.append((settings, measured, (said.inside, said.between)))
    return results


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("mesh", [{}, {"slices": 2}, {"replicas": 2}], ids=str)
def test_bytes(mesh, verify):
    for options, counts in (({}, [3, 0, 5, 2]), ({"capacity_factor": 1.0}, [4, 4, 4, 4])):
        for results in run_ranks(count, 4, mesh, options, counts, verify):
            assert any(measured != (0, 0) for _, measured, _ in results)
            for plan, measured, predicted in results:
                assert measured == predicted, plan


@pytest.mark.parametrize(("kind", "mesh"), [("stacked", {"slices": 2}), ("modules", {"replicas": 2})])
def test_bytes_of_buffers(kind, mesh):
    """They are gathered with the parameters, and have no gradient, as parameters that are not trained."""
    for results in run_ranks(count, 4, mesh, {}, [3, 0, 5, 2], False, kind):
        for plan, measured, predicted in results:
            assert measured == predicted, plan
