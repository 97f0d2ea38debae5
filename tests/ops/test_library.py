"""The registered operators: opcheck, gradcheck, compilation, and the refusal of second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexpert import ops
from flexpert.core.errors import FlexpertError
from flexpert.ops import reference

SMALL = {"tokens": 5, "model_dim": 3, "hidden_dim": 4, "output_dim": 2, "counts": (2, 0, 3), "spare": 2}


def calls(case):
    """name -> (function of tensors that get a gradient, those tensors)."""
    rows = case.x_TD.detach()[case.unit_N].requires_grad_()
    units = len(case.x_TD)
    return {
        "gather_rows": (lambda x: ops.gather_rows(x, case.unit_N, case.counts_E), [case.x_TD]),
        "grouped_linear": (
            lambda rows, w, b: ops.grouped_linear(rows, w, b, case.counts_E, case.slot_E),
            [rows, case.w1.detach().flatten(1, -2).requires_grad_(),
             case.b1.detach().flatten(1).requires_grad_()],
        ),
        "scatter_combine": (
            lambda rows, weight: ops.scatter_combine(
                rows, case.unit_N, weight, case.counts_E, units, rows.dtype
            ),
            [rows, case.weight_N],
        ),
        "grouped_mlp": (
            lambda x, weight, w1, b1, w2, b2: ops.grouped_mlp(
                x, case.unit_N, weight, case.counts_E, case.slot_E, w1, b1, w2, b2, case.activation
            ),
            list(case.leaves.values()),
        ),
    }  # fmt: skip


NAMES = ["gather_rows", "grouped_linear", "scatter_combine", "grouped_mlp"]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(make_case, name, gated):
    function, leaves = calls(make_case(**SMALL, gated=gated))[name]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused(make_case, name):
    function, leaves = calls(make_case(**SMALL))[name]
    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(FlexpertError, match=f"flexpert::{name} cannot be differentiated twice"):
        torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
    with ops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(make_case, gated, dtype):
    case = make_case(**SMALL, gated=gated, dtype=dtype, slots=(1, 0, -1))
    rows = case.x_TD.detach()[case.unit_N].requires_grad_()
    w, b = (t.detach().flatten(1, i).requires_grad_() for t, i in ((case.w1, -2), (case.b1, -1)))
    op = torch.ops.flexpert
    key = torch.tensor([0, 3, 1, 1, 9, 0])
    torch.library.opcheck(op.assign, (key, 3, None))
    torch.library.opcheck(op.assign, (key, 3, torch.tensor([1, 1, 1])))
    torch.library.opcheck(op.gather_rows, (case.x_TD, case.unit_N, case.counts_E))
    torch.library.opcheck(op.grouped_linear, (rows, w, b, case.counts_E, case.slot_E))
    torch.library.opcheck(op.grouped_linear, (rows, w, None, torch.tensor([4, 1]), None))
    combine = rows, case.unit_N, case.weight_N, case.counts_E, 5, torch.float32
    torch.library.opcheck(op.scatter_combine, combine)
    torch.library.opcheck(op.grouped_mlp, (*case.args, True))
    with torch.no_grad():
        frozen = [a.detach() if torch.is_tensor(a) else a for a in case.args]
        torch.library.opcheck(op.grouped_mlp, (*frozen, False))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_compiles_as_one_graph(make_case, assert_same, gated, dtype, dynamic):
    def routed(key, x, w, w1, b1, w2, b2):
        order, counts = ops.assign(key, 3, None)
        return ops.grouped_mlp(x, order % len(x), w, counts, None, w1, b1, w2, b2, "silu")

    compiled = torch.compile(routed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 8) if dynamic else (5,):
        case = make_case(tokens=tokens, counts=(tokens, tokens, 0), dtype=dtype, gated=gated)
        true = case.double()
        key = torch.arange(2 * tokens) % 4
        order, counts = reference.assign(key, 3)
        want = (order % tokens, true.weight_N, counts, None, true.w1, true.b1, true.w2, true.b2, "silu")
        assert_same(
            lambda case=case, key=key: compiled(key, *case.leaves.values()),
            lambda true=true, want=want: reference.grouped_mlp(true.x_TD, *want),
            case.leaves,
            true.leaves,
        )


@pytest.mark.parametrize("name", NAMES)
def test_each_operator_compiles(make_case, name):
    function, leaves = calls(make_case(**SMALL, dtype=torch.float32))[name]
    want = function(*leaves)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(got, want)
    dy = torch.ones_like(want)
    for mine, true in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert torch.equal(mine, true)


def test_expanded_gradients_are_accepted(make_case):
    for function, leaves in calls(make_case(**SMALL)).values():
        function(*leaves).sum().backward()
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
        for leaf in leaves:
            leaf.grad = None


def test_inputs_of_any_strides(make_case):
    case = make_case(tokens=6, model_dim=8, hidden_dim=4, counts=(5, 7), gated=True)
    want = ops.grouped_mlp(*case.args)

    def strided(leaf):
        leaf = leaf.detach()
        return leaf.mT.contiguous().mT if leaf.dim() > 1 else leaf.repeat_interleave(2)[::2]

    odd = {name: strided(leaf).requires_grad_() for name, leaf in case.leaves.items()}
    got = ops.grouped_mlp(
        odd["x_TD"], case.unit_N, odd["weight_N"], case.counts_E, None,
        odd["w1"], odd["b1"], odd["w2"], odd["b2"], case.activation,
    )  # fmt: skip
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for name, mine, true in zip(
        odd,
        torch.autograd.grad(got, list(odd.values()), dy.mT.contiguous().mT),
        torch.autograd.grad(want, list(case.leaves.values()), dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, msg=name)


def test_no_graph_keeps_nothing(make_case):
    case = make_case()
    with torch.no_grad():
        assert not ops.grouped_mlp(*case.args).requires_grad
    with pytest.raises(FlexpertError, match="needs save=True"):
        torch.ops.flexpert.grouped_mlp(*case.args, False)


class _Seen(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Wrapped(torch.Tensor):
    """A tensor of another type."""


def test_who_watches_sees_the_operators():
    """Plain calls skip the dispatcher; those under a mode or a profiler, and of subclasses, do not."""
    logits, name = torch.randn(3, 4), "flexpert::router_logits"
    weight = torch.randn(5, 4)
    with torch.no_grad():
        want = ops.router_logits(logits, weight)
        with _Seen() as seen:
            assert torch.equal(ops.router_logits(logits, weight), want)
        assert seen.names.count(name) == 1
        with torch.profiler.profile() as profile:
            assert torch.equal(ops.router_logits(logits, weight), want)
        assert name in {event.key for event in profile.key_averages()}
        wrapped = ops.router_logits(logits, weight.as_subclass(_Wrapped))
        assert torch.equal(wrapped.as_subclass(torch.Tensor), want)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_have_the_same_bits_whoever_watches(make_case, name):
    function, leaves = calls(make_case(**SMALL, dtype=torch.float32))[name]

    def values():
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    want = values()
    with _Seen() as seen:
        assert all(map(torch.equal, values(), want))
    assert {f"flexpert::{name}", f"flexpert::{name}_backward"} <= set(seen.names)
