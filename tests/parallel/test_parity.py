"""Every plan on every world gives what one process gives on the concatenated batch."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from flexpert import RoutingContext
from flexpert.testing import assert_close, run_ranks
from tests.parallel.cases import batch_context, on_one_process, on_ranks

PLANS = [
    {"r": r, "degree": degree, "capacity": capacity}
    for r, degree, capacity in itertools.product((0, 1, 2), (1, 3), ("ragged", "padded"))
    if r or degree == 1
]


def plans(*legal, algorithms=("linear",)):
    return [{**plan, "algorithm": a} for plan in PLANS if plan["r"] in legal for a in algorithms]


def check(kind, counts, todo, *, context=None, norm=None, tolerance=1e-11, **settings):
    options = settings.pop("options", {})
    dtype = settings.get("dtype", torch.float64)
    want = on_one_process(kind, counts, dtype=dtype, context=context, norm=norm, **options)
    ranks = run_ranks(
        _on_ranks, len(counts), kind, counts, todo, {"norm": norm, "options": options, **settings}
    )
    assert not any(moved for _, moved in ranks), "switching moved a parameter"
    for i, plan in enumerate(todo):
        results = [result[i] for result, _ in ranks]
        for name in ("output", "input gradient"):
            got = torch.cat([result[name] for result in results])
            assert_close(got, want[name], tolerance, name=f"{plan}: {name}")
        for rank, result in enumerate(results):
            for name in ("gradients", "parameters"):
                assert result[name].keys() == want[name].keys(), (plan, rank)
                for key, value in want[name].items():
                    scale = 1e-3 * float(value.norm() + 1)
                    assert_close(
                        result[name][key], value, tolerance, scale=scale, name=f"{plan} {rank} {name} {key}"
                    )
            if norm:
                assert_close(result["norm"], want["norm"], 1e-6, name=f"{plan} {rank}: norm")


def _on_ranks(kind, counts, todo, settings):
    return on_ranks(kind, counts, todo, **settings)


@pytest.mark.parametrize("kind", ["mlp", "glu", "mixed"])
@pytest.mark.parametrize("counts", [[4, 4], [5, 0], [1, 6]], ids=str)
def test_two_ranks(kind, counts):
    check(kind, counts, plans(0, 1), norm=0.5)


@pytest.mark.parametrize(
    ("counts", "mesh", "only"),
    [
        ([4, 3], {}, None),
        ([6, 0], {}, None),
        ([5, 4], {}, [2]),
        ([4, 0, 3], {}, None),
        ([3, 0, 5, 2], {"replicas": 2}, None),
        ([3, 0, 5, 2], {"slices": 2}, None),
        ([0, 3, 0, 0], {"slices": 4}, [1]),
    ],
    ids=str,
)
def test_unlike_modules(counts, mesh, only):
    options = {"num_experts": 6, "top_k": 2 if only is None else 1}
    context = only and RoutingContext(expert_mask=torch.isin(torch.arange(6), torch.tensor(only)))
    todo = [{"r": r, "degree": d, "capacity": c} for r in (0, 1) for d, c in ((1, "ragged"), (2, "padded"))]
    settings = {"mesh": {"num_experts": 6, **mesh}, "only": only, "options": options, "context": context}
    check("modules", counts, todo, norm=0.1, **settings)


def test_stacked_modules():
    check("stacked", [4, 0, 3], plans(0, 1), mesh={"num_experts": 6}, norm=0.1, options={"num_experts": 6})
    mesh = {"num_experts": 4, "slices": 2}
    todo = [
        {"r": r, "degree": d, "capacity": c} for r in (0, 1, 2) for d, c in ((1, "ragged"), (2, "padded"))
    ]
    check("stacked", [3, 0, 5, 2], todo, mesh=mesh, norm=0.1)


@pytest.mark.parametrize("bias", [False, "b1", "b2"])
@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_slices(kind, bias):
    mesh = {"num_experts": 4, "slices": 2}
    check(kind, [4, 5], plans(0, 1, 2), mesh=mesh, options={"expert_bias": bias})


@pytest.mark.parametrize(
    ("mesh", "legal"),
    [
        ({"num_experts": 4}, (0, 1)),
        ({"num_experts": 4, "replicas": 2}, (0, 1)),
        ({"num_experts": 4, "slices": 2}, (0, 1, 2)),
        ({"num_experts": 4, "slices": 4}, (0, 1, 2, 4)),
        ({"num_experts": 4, "replicas": 2, "slices": 2}, (0, 1, 2)),
    ],
    ids=str,
)
def test_four_ranks(mesh, legal):
    todo = [{"r": r, "degree": d, "capacity": c} for r in legal for d, c in ((1, "ragged"), (2, "padded"))]
    check("mlp", [3, 0, 5, 2], todo, mesh=mesh, norm=0.1)


def test_fewer_experts_than_ranks():
    todo = [{"r": r, "degree": 2} for r in (0, 1, 2)]
    check("glu", [3, 4, 1, 2], todo, mesh={"num_experts": 2}, options={"num_experts": 2})


@pytest.mark.parametrize("slices", [1, 2])
def test_hierarchical(slices):
    todo = [
        {"r": r, "degree": d, "capacity": c, "algorithm": "2dh"}
        for r in (0, 1, slices)
        for d, c in ((1, "ragged"), (3, "ragged"), (2, "padded"))
    ]
    check("mlp", [3, 0, 5, 2], todo, mesh={"num_experts": 4, "slices": slices, "ranks_per_node": 2})


@pytest.mark.parametrize("factor", [0.5, 1.25, 0.0, -1.0])
def test_capacity_per_rank(factor):
    counts = [6, 6]
    options = {"capacity_factor": factor, "batch_prioritized": True}
    check("mlp", counts, plans(0, 1), context=batch_context(counts), options=options)


@pytest.mark.parametrize("router", ["cosine", "expert_choice", "soft"])
def test_other_routers(router):
    counts = [6, 6]
    options = {"router": router} | ({"capacity_factor": 1.0} if router == "expert_choice" else {})
    check("mlp", counts, plans(0, 1), context=batch_context(counts), options=options)


def test_single_precision():
    check("glu", [5, 4], plans(0, 1), dtype=torch.float32, tolerance=1e-5)


def test_accumulation():
    check("mlp", [4, 4], plans(0, 1), backwards=3)


def test_one_token_for_one_expert():
    options = {"num_experts": 4, "top_k": 1}
    check("mlp", [1, 0], plans(0, 1), options=options)


def test_all_tokens_to_one_expert():
    context = RoutingContext(expert_mask=torch.arange(4) == 2)
    options = {"top_k": 1}
    check("mlp", [3, 6], plans(0, 1), context=context, only=[2], options=options)


def test_one_expert_on_all_ranks():
    todo = [{"r": r, "degree": 8, "algorithm": a} for r in (0, 1, 2, 4) for a in ("linear", "2dh")]
    mesh = {"num_experts": 1, "ranks_per_node": 2}
    check("mlp", [9, 4, 2, 7], todo, mesh=mesh, options={"num_experts": 1, "top_k": 1})


def test_one_rank():
    check("mixed", [5], plans(0, 1))


LARGE = [
    (8, {"num_experts": 8, "ranks_per_node": 4}, 8),
    (8, {"num_experts": 8, "replicas": 2, "slices": 2, "ranks_per_node": 2}, 8),
    (8, {"num_experts": 4, "ranks_per_node": 4}, 4),
    (8, {"num_experts": 2, "ranks_per_node": 2}, 2),
    (8, {"num_experts": 1, "ranks_per_node": 4}, 1),
    (6, {"num_experts": 12, "ranks_per_node": 3}, 12),
    (6, {"num_experts": 3, "ranks_per_node": 2}, 3),
]


@pytest.mark.skipif(
    os.environ.get("FLEXPERT_MANY_RANKS") != "1", reason="6 and 8 ranks take minutes: FLEXPERT_MANY_RANKS=1"
)
@pytest.mark.parametrize(("world", "mesh", "experts"), LARGE, ids=str)
def test_six_and_eight_ranks(world, mesh, experts):
    counts = [3, 0, 5, 2, 1, 7, 4, 4][:world]
    slices = mesh.get("slices", max(1, world // mesh.get("replicas", 1) // experts))
    todo = [
        {"r": r, "degree": degree, "algorithm": algorithm, "capacity": capacity}
        for r in (0, *(n for n in range(1, slices + 1) if slices % n == 0))
        for degree, algorithm, capacity in (
            (1, "linear", "ragged"),
            (2, "2dh", "ragged"),
            (4, "2dh", "padded"),
        )
    ]
    options = {"num_experts": experts, "top_k": min(2, experts)}
    check("glu", counts, todo, mesh=mesh, norm=0.1, options=options)
