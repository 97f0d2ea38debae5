"""Small problems."""

from __future__ import annotations

import pytest
import torch

from flexpert.bench.problem import Problem, Shape, make_problem


def small(**changes) -> Shape:
    facts = {
        "tokens": 24,
        "model_dim": 16,
        "hidden_dim": 24,
        "num_experts": 4,
        "top_k": 2,
        "capacity_factor": None,
        "gated": False,
        "activation": "gelu",
    }
    return Shape(**(facts | changes))


@pytest.fixture
def make():
    """A function from changes of a small shape, and a dtype, to its problem."""

    def made(dtype=torch.float32, **changes) -> Problem:
        return make_problem(small(**changes), dtype)

    return made
