"""Functional transforms and tensors on several devices: the right result or an error, never a wrong one."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from flexpert import ops
from flexpert.core.errors import FlexpertError, InputError
from tests.ops.test_library import NAMES, SMALL, calls

ROUTING = {
    "route": (lambda x: ops.route(x, 2).score_TE, (5, 4)),
    "router_logits": (lambda x: ops.router_logits(x, torch.ones(3, 4)), (5, 4)),
}
GRAD = pytest.mark.parametrize("grad", [False, True])


def functions(make_case):
    """name -> (function of one tensor, that tensor)."""
    found = {}
    for name, (function, leaves) in calls(make_case(**SMALL, dtype=torch.float32)).items():
        first, *rest = (leaf.detach() for leaf in leaves)
        found[name] = lambda x, function=function, rest=rest: function(x, *rest), first
    return found | {name: (function, torch.randn(shape)) for name, (function, shape) in ROUTING.items()}


@GRAD
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # what PyTorch's jvp imports
@pytest.mark.parametrize("name", [*NAMES, *ROUTING])
def test_forward_mode_is_refused(make_case, name, grad):
    """An operator without such a derivative has the tangent 0 in PyTorch, without a word."""
    function, x = functions(make_case)[name]
    refused = pytest.raises(FlexpertError, match=rf"flexpert::{name} has no forward-mode derivative")
    with torch.set_grad_enabled(grad):
        with refused:
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():
            assert torch.equal(function(x), function(x.clone()))  # without a tangent it is a usual call
            with refused:
                function(forward_ad.make_dual(x, torch.ones_like(x)))
        with ops.use_backend("reference"):
            _, tangent = torch.func.jvp(function, (x,), (torch.randn_like(x),))
    assert tangent.any()


@GRAD
@pytest.mark.parametrize("name", [*NAMES, *ROUTING])
def test_vmap_is_a_loop(make_case, name, grad):
    function, x = functions(make_case)[name]
    several = torch.stack([x, -x, 2 * x])
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        got = torch.vmap(function)(several)
    assert torch.equal(got, torch.stack([function(x) for x in several]))


@pytest.mark.parametrize("name", [*NAMES, *ROUTING])
def test_functional_gradients_are_refused(make_case, name):
    function, x = functions(make_case)[name]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: function(x).sum())(x)


@pytest.mark.parametrize("name", ["x_TD", "unit_N", "weight_N", "counts_E", "w1", "b1", "w2", "b2"])
def test_tensors_on_two_devices_are_refused(make_case, name):
    case = make_case(dtype=torch.float32)
    case = replace(case, **{name: getattr(case, name).to("meta")})
    with pytest.raises(InputError, match=r"grouped_mlp: tensors on .*meta.*; move them to one device"):
        ops.grouped_mlp(*case.args)
