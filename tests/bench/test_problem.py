from __future__ import annotations

import torch

from flexpert.bench.problem import SHAPES


def test_capacity_drops_later_choices_first(make):
    problem = make(capacity_factor=0.5)
    assert problem.shape.capacity == 2 * 3
    kept = problem.id_TK.flatten()[problem.id_TK.flatten() < 4]
    assert 0 < len(kept) < 48
    assert torch.bincount(kept).max() <= 6
    first, second = (problem.id_TK < 4).sum(0).tolist()
    assert first >= second
    assert make().rows == 48


def test_work_and_bytes_are_those_of_the_kept_rows(make):
    problem = make(tokens=1, gated=True, dtype=torch.bfloat16)
    weights = problem.w1[0].numel() + problem.w2[0].numel()
    assert problem.flops == 2 * 2 * weights
    assert problem.touched_bytes == 2 * 2 * weights
    # Every choice of an expert beyond its capacity is not touched.
    problem = make(capacity_factor=0.1)
    assert problem.flops == 2 * problem.rows * 2 * 16 * 24
    assert problem.touched_bytes <= 4 * 4 * 2 * 16 * 24


def test_published_configurations():
    """Those that the recorded results are of."""
    sizes = {
        name: (s.tokens, s.model_dim, s.hidden_dim, s.num_experts, s.top_k) for name, s in SHAPES.items()
    }
    assert sizes == {
        "A": (4096, 1024, 1024, 8, 2),
        "B": (4096, 1024, 512, 64, 6),
        "C": (3136, 512, 2048, 32, 1),
    }
    assert [shape.capacity_factor for shape in SHAPES.values()] == [1.0, None, 1.25]
