"""Parameters gathered over any group are those joined by hand, and their gradients come back summed."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from flexpert.parallel import gathering
from flexpert.parallel.gathering import Part, gathered
from flexpert.testing import run_ranks
from tests.parallel.transports import make_group

# (shape of a part, slices, dim): joined without a copy or with one, or not cut at all
SHAPES = [((1, 2, 3), 2, 1), ((2, 2, 3), 2, 1), ((1, 3, 2), 2, 2), ((1, 2, 2), 4, 1), ((2, 3), 1, 0)]


def part_of(rank, place):
    generator = torch.Generator().manual_seed(10 * rank + place)
    return torch.randn(SHAPES[place][0], generator=generator)


def joined(place, ranks=4):
    """Along `dim` those of neighbours, along 0 those of their groups."""
    _, slices, dim = SHAPES[place]
    parts = [part_of(rank, place) for rank in range(ranks)]
    return torch.cat([torch.cat(parts[i : i + slices], dim) for i in range(0, ranks, slices)])


def gather_all(small):
    gathering.SMALL = small
    group, rank = make_group("four", range(4)), dist.get_rank()
    parts = [Part(group, slices, dim, 0.5) for _, slices, dim in SHAPES]
    parts += [Part(None, 1, 0, 0.25), Part(None, 1, 0, 1.0, nothing=True)]
    locals_ = [part_of(rank, place).requires_grad_() for place in range(len(SHAPES))]
    locals_ += [torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    locals_[1].requires_grad_(False)
    wholes = gathered(locals_, parts, torch.float32, "experts")
    for place in range(len(SHAPES)):
        assert torch.equal(wholes[place], joined(place))
    assert torch.equal(wholes[-2], locals_[-2])
    assert not wholes[-1].any()
    messages = group.traffic.snapshot()["all_gather"]["between"]["messages"]
    with torch.no_grad():
        assert all(map(torch.equal, gathered(locals_, parts, torch.float32, "experts"), wholes))
    # d/d whole of sum over ranks of (rank + 1) whole^2 / 2: ten times the values, of which half is kept.
    sum(((rank + 1) * whole.square()).sum() / 2 for whole in wholes).backward()
    for place, local in enumerate(locals_[: len(SHAPES)]):
        if place != 1:
            torch.testing.assert_close(local.grad, 5.0 * local.detach())
    assert locals_[1].grad is None
    torch.testing.assert_close(locals_[-2].grad, 0.25 * (rank + 1) * locals_[-2].detach())
    assert not locals_[-1].grad.any()
    return messages


@pytest.mark.parametrize(("small", "messages"), [(0, len(SHAPES)), (1 << 18, 1)])
def test_parts_are_joined_and_gradients_summed(small, messages):
    assert run_ranks(gather_all, 4, small) == [3 * messages] * 4
