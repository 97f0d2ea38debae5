"""Collectives are linear maps over all ranks, and their gradients the transposes of these, on any group."""

from __future__ import annotations

import pytest
import torch

from flexpert import InputError
from flexpert.parallel.differentiable import all_gather, all_reduce, reduce_scatter
from flexpert.testing import run_ranks
from tests.parallel.transports import make_group, make_world


def everybody(size, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (size, *shape), generator=generator).double()


def in_one_process(name, x_P, dim):
    """The collective as a function of all ranks' inputs: their outputs."""
    size = len(x_P)
    if name == "all_reduce":
        return x_P.sum(0).expand(size, *x_P.shape[1:])
    if name == "all_gather":
        return torch.cat(list(x_P), dim).expand(size, *[-1] * (x_P.dim() - 1))
    return torch.stack(x_P.sum(0).chunk(size, dim))


def on_ranks(name, x, group, dim):
    if name == "all_reduce":
        return all_reduce(x, group)
    return (all_gather if name == "all_gather" else reduce_scatter)(x, group, dim)


def check_adjoint(name, ranks, dim, shape):
    """Output, gradient and second derivative of the sum over ranks of (w y^3) equal those of one process."""
    group = make_group("some", ranks)
    if group is None:
        return
    me, x_P = group.rank, everybody(group.size, shape, 0).requires_grad_()
    y_P = in_one_process(name, x_P, dim)
    w_P, v_P = everybody(group.size, y_P.shape[1:], 1), everybody(group.size, shape, 2)
    (want,) = torch.autograd.grad((w_P * y_P**3).sum(), x_P, create_graph=True)
    (want_second,) = torch.autograd.grad((want * v_P).sum(), x_P)
    x = x_P[me].detach().clone().requires_grad_()
    y = on_ranks(name, x, group, dim)
    assert torch.equal(y, y_P[me])
    (grad,) = torch.autograd.grad((w_P[me] * y**3).sum(), x, create_graph=True)
    assert torch.equal(grad, want[me])
    (second,) = torch.autograd.grad((grad * v_P[me]).sum(), x)
    assert torch.equal(second, want_second[me])


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [1, 3], [0, 1, 3]])
@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "reduce_scatter"])
def test_gradients_are_those_of_one_process(name, ranks):
    size = len(ranks)
    run_ranks(check_adjoints, 4, name, ranks, [(0, (size, 3)), (1, (2, 2 * size, 3)), (-1, (0, size))])


def check_adjoints(name, ranks, cases):
    for dim, shape in cases:
        check_adjoint(name, ranks, dim, shape)


def keep_input():
    group = make_world()
    x = torch.full((3,), 2.0, requires_grad=True)
    all_reduce(x, group).sum().backward()
    with pytest.raises(InputError, match="reduce_scatter: 3 of dim 0 do not divide by 2 ranks"):
        reduce_scatter(x, group)
    return x.tolist(), x.grad.tolist()


def test_inputs_stay_and_sizes_are_checked():
    assert run_ranks(keep_input, 2) == [([2.0] * 3, [2.0] * 3)] * 2
