"""Ranks that disagree about the mesh, the model, the plan or the mode get an error in place of a deadlock."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from flexpert import DistributedError, MoE, MoEConfig
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.parallel import agree as agreement
from flexpert.testing import run_ranks


def message(function):
    """Of the error that every rank must get."""
    try:
        function()
    except DistributedError as error:
        return str(error)
    return "no error"


def mesh_with(arguments):
    groups = len(dist.distributed_c10d._world.pg_map)
    text = message(lambda: expert_mesh(**arguments[dist.get_rank()]))
    return text, len(dist.distributed_c10d._world.pg_map) - groups


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"replicas": 1}, {"replicas": 2}, "replicas: 1 and 2"),
        ({"timeout": 30.0}, {"timeout": 40.0}, "timeout: 30.0 and 40.0"),
        ({}, {"num_experts": 4}, "num_experts: 8 and 4"),
        ({"ranks": [0, 1]}, {"ranks": [1, 0]}, "ranks: [0, 1] and [1, 0]"),
        ({}, {"replicas": 3}, "replicas: 1 and 3"),
    ],
    ids=str,
)
def test_meshes_with_unlike_arguments_are_refused_before_a_group_is_made(first, second, told):
    arguments = [{"num_experts": 8, **first}, {"num_experts": 8, **second}]
    left, right = told.split(": ")[1].split(" and ")
    mirrored = f"{told.split(': ')[0]}: {right} and {left}"
    for (text, made), want in zip(run_ranks(mesh_with, 2, arguments), (told, mirrored), strict=True):
        assert want in text
        assert made == 0


def mesh_under_other_version():
    if dist.get_rank() == 1:
        agreement.versions = lambda: {"torch": "0.0", "flexpert": "0.0"}
        from flexpert.parallel import mesh

        mesh.versions = agreement.versions
    try:
        return message(lambda: expert_mesh(4))
    finally:
        import importlib

        importlib.reload(agreement)
        from flexpert.parallel import mesh

        mesh.versions = agreement.versions


def test_other_versions_are_refused():
    texts = run_ranks(mesh_under_other_version, 2)
    assert "torch: " in texts[0]
    assert "and '0.0'" in texts[0]
    assert "differ in" in texts[1]


def mesh_that_one_rank_skips():
    return "" if dist.get_rank() == 1 else message(lambda: expert_mesh(4, timeout=0.5))


def test_a_rank_that_does_not_come_is_named():
    text, _ = run_ranks(mesh_that_one_rank_skips, 2)
    assert text == "expert_mesh on ranks (0, 1): rank 1 did not call it within 0.5 s"


def several_meshes():
    rank = dist.get_rank()
    pair = [0, 1] if rank < 2 else [2]
    everyone = expert_mesh(3)
    sizes = [everyone.whole.size, expert_mesh(3, heartbeat=0.2).whole.size]
    sizes += [expert_mesh(4, ranks=pair).whole.size, expert_mesh(4, ranks=pair).whole.size]
    return [*sizes, everyone.timeout.total_seconds()], message(lambda: expert_mesh(3))


def test_meshes_over_all_and_over_parts_of_the_world():
    results = run_ranks(several_meshes, 3)
    # 120 s is the limit of the world's own group, which they inherit.
    assert [sizes for sizes, _ in results] == [[3, 3, 2, 2, 120.0]] * 2 + [[3, 3, 1, 1, 120.0]]
    # After unlike parts PyTorch would give one group two names.
    assert all("process groups made before: " in text for _, text in results)


def layer(num_experts=4, **settings):
    torch.manual_seed(0)
    return MoE(MoEConfig(model_dim=6, hidden_dim=8, num_experts=num_experts, top_k=1, **settings))


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = layer(8), layer(4)


def calls(case):  # noqa: PLR0911 - a table
    """Two layers over all ranks, and rank 1 doing something else with them."""
    model, other = Pair(), dist.get_rank() == 1
    if case == "another model" and other:
        with torch.no_grad():
            model.a.experts.w1.add_(1)
    parallelized = message(lambda: parallelize(model, expert_mesh(8, timeout=60.0)))
    if parallelized != "no error":
        return parallelized
    x = torch.randn(5, 6)
    match case:
        case "r":
            return message(lambda: model.a(x, plan=ExecutionPlan(r=0 if other else 1)))
        case "degree":
            return message(lambda: model.a(x, plan=ExecutionPlan(degree=2 if other else 1)))
        case "order":
            return message(lambda: (model.b if other else model.a)(x))
        case "order, r=0":
            return message(lambda: (model.b if other else model.a)(x, plan=ExecutionPlan(r=0)))
        case "dtype":
            return message(lambda: model.a(x.double() if other else x))
        case "input's requires_grad":
            return message(lambda: model.a(x.requires_grad_(other)))
        case "parameters' requires_grad":
            model.a.experts.requires_grad_(not other)
            return message(lambda: model.a(x))
        case "no_grad":
            with torch.set_grad_enabled(not other):
                return message(lambda: model.a(x))
    return "no error"


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("another model", "the model's values differ between rank"),
        ("r", "give every rank the same plan in every call"),
        ("degree", "give every rank the same plan in every call"),
        ("order", "calls with other facts (layer, width or dtype)"),
        ("order, r=0", "calls with other facts (layer, width or dtype)"),
        ("dtype", "calls with other facts (layer, width or dtype)"),
        ("input's requires_grad", "(its tokens' or parameters' requires_grad)"),
        ("parameters' requires_grad", "(its tokens' or parameters' requires_grad)"),
        ("no_grad", "(its tokens' or parameters' requires_grad)"),
    ],
)
def test_ranks_that_do_unlike_things_are_told_before_rows_travel(case, told):
    for text in run_ranks(calls, 2, case):
        assert told in text
