"""Memory: all of an output is written, and only the arguments' elements are read, wherever they lie."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexpert import ops

pytestmark = pytest.mark.usefixtures("live")

ROOT = Path(__file__).parents[3]
DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")
FAR = 2**31  # elements: offsets of 32 bits end before
operators = torch.ops.flexpert


def gradients(case, dy=None):
    y = ops.grouped_mlp(*case.args)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(case.leaves.values()), dy)]


def assert_same_bits(got, want):
    for mine, true in zip(got, want, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_between_pages_that_may_not_be_touched(dtype):
    """In a process of its own, which a wrong address kills."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.cpu.guarded", dtype],
        cwd=ROOT, env={**os.environ, "FLEXPERT_NATIVE": "require"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "140 calls\n"


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_buffers_begin_as_nan(make_case, poisoned, gated, dtype):
    assert torch.empty(3, dtype=dtype).isnan().all()
    assert torch.ones(3, dtype=dtype).new_empty(3).isnan().all()
    # Whatever the library keeps from call to call is full of NaN after this one.
    bad = make_case(tokens=90, counts=(70, 90), gated=gated, dtype=dtype)
    with torch.no_grad():
        for leaf in bad.leaves.values():
            leaf.fill_(NAN)
    assert gradients(bad)[0][0].isnan().all()
    case = make_case(tokens=9, counts=(3, 4, 2), slots=(0, -1, 1), spare=5, gated=gated, dtype=dtype)
    assert all(result.isfinite().all() for result in gradients(case))


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_what_takes_no_part_is_not_read(make_case, gated, dtype):
    """Tokens without rows, rows of absent experts, rows past the total, weights of slots without rows."""
    case = make_case(tokens=9, counts=(3, 4, 2, 0), slots=(0, -1, 3, 2), spare=5, gated=gated, dtype=dtype)
    case.unit_N[:] = 1 + torch.arange(len(case.unit_N)) % 8
    dy = torch.randn(9, case.w2.shape[1]).to(dtype)
    want = gradients(case, dy)
    case.unit_N[3:7] = case.unit_N[9:] = 0
    case.unit_N[9:] = 2**40
    with torch.no_grad():
        case.x_TD[0] = case.weight_N[3:7] = case.weight_N[9:] = NAN
        for name in ("w1", "b1", "w2", "b2"):
            getattr(case, name)[1:3] = NAN
        dy[0] = NAN
    got = gradients(case, dy)
    for result in (got, want):  # rows 3 to 7 went to other tokens at first, and gave them nothing
        assert all(part.isfinite().all() for part in result)
    assert_same_bits(got, want)


@pytest.mark.each_cap
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_addresses(make_case, dtype):
    case = make_case(tokens=40, model_dim=33, counts=(30, 50), gated=True, dtype=dtype)
    want = gradients(case)

    def strided(value: Tensor) -> Tensor:
        return value.mT.contiguous().mT if value.dim() > 1 else value.repeat_interleave(2)[::2]

    def odd(value: Tensor) -> Tensor:
        wide = torch.full((value.numel() + 2,), NAN if value.is_floating_point() else -1, dtype=value.dtype)
        wide[1:-1] = value.flatten()
        return wide[1:-1].view(value.shape)

    for change in (strided, odd):
        tensors = {name: value for name, value in vars(case).items() if isinstance(value, Tensor)}
        leaves = {
            name: change(value.detach()).requires_grad_(value.requires_grad)
            for name, value in tensors.items()
        }
        dy = torch.randn(40, 33, generator=torch.Generator().manual_seed(2)).to(dtype)
        assert_same_bits(gradients(replace(case, **leaves), change(dy)), want)


# Offsets past 2^31 elements -----------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Pages are taken when they are written, so that a large tensor costs what is written to it."""
    count = torch.Size(shape).numel()
    memory = mmap.mmap(
        -1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )  # NORESERVE
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def both(args, dy, needs):
    y, pre = operators.grouped_mlp(*args, True)
    x, unit, weight, counts, slot, w1, _, w2, b2, activation = args
    return (
        y,
        pre,
        *operators.grouped_mlp_backward(
            dy, pre, x, unit, weight, counts, slot, w1, w2, b2, activation, needs
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_tokens_are_read(dtype):
    """The last tokens of an x, and of a gradient of y, that have more than 2^31 elements."""
    wide, tokens, rows = 4096, FAR // 4096 + 20, 12
    x, dy, few = zeros(tokens, wide, dtype=dtype), zeros(tokens, wide, dtype=dtype), torch.randn(20, wide)
    x[-20:] = dy[-20:] = few.to(dtype)
    unit = tokens - 20 + torch.arange(rows)
    weight, counts = torch.rand(rows), torch.tensor([5, 7])
    w1, w2 = torch.randn(2, 3, wide).to(dtype) / 64, torch.randn(2, 2, 3).to(dtype)
    near = x[-20:].clone(), torch.arange(rows), weight, counts, None, w1, None, w2, None, "silu"
    needs = [False, True, True, True, True, True]
    want = both(near, dy[-20:, :2].contiguous(), needs)
    got = both((x, unit, *near[2:]), zeros(tokens, 2, dtype=dtype).index_copy_(0, unit, dy[unit, :2]), needs)
    assert_same_bits([got[0][-20:], *got[1:]], want)
    # The gradient is as wide now, and x is narrow.
    w1, w2 = torch.randn(2, 3, 2).to(dtype), torch.randn(2, wide, 3).to(dtype)
    pre, needs[0] = torch.randn(len(want[1]), 3).to(dtype), True
    rest, x = (weight, counts, None, w1, w2, None, "silu", needs), x[:, :2].contiguous()
    far = operators.grouped_mlp_backward(dy, pre, x, unit, *rest)
    same = operators.grouped_mlp_backward(dy[-20:].clone(), pre, x[-20:], near[1], *rest)
    assert_same_bits([far[0][-20:], *far[1:]], same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_far_weights_are_read(gated, dtype):
    """The last slot of weights that have more than 2^31 elements."""
    inner = (2, 128) if gated else (256,)
    slots = FAR // (256 * 256) + 2
    w1, w2 = zeros(slots, *inner, 256, dtype=dtype), zeros(slots, 512, inner[-1], dtype=dtype)
    w1[-1], w2[-1] = torch.randn(*inner, 256) / 16, torch.randn(512, inner[-1]) / 16
    x, unit, weight = torch.randn(9, 256).to(dtype), torch.arange(9), torch.rand(9)
    counts, slot, needs = torch.tensor([9]), torch.tensor([0]), [True, True, False, False, False, False]
    dy = torch.randn(9, 512).to(dtype)
    near = (x, unit, weight, counts, slot, w1[-1:].clone(), None, w2[-1:].clone(), None, "relu")
    far = (x, unit, weight, counts, slot + slots - 1, w1, None, w2, None, "relu")
    assert_same_bits(both(far, dy, needs), both(near, dy, needs))


@pytest.mark.skipif(
    os.environ.get("FLEXPERT_TEST_HUGE") != "1", reason="takes 17 GB and minutes: FLEXPERT_TEST_HUGE=1"
)
@pytest.mark.parametrize("dtype", DTYPES)
class TestFarWrites:
    """Results of more than 2^31 elements, zero but for the last few rows: those of a small call."""

    def test_y_and_the_gradient_of_x(self, dtype):
        wide, tokens = 4096, FAR // 4096 + 20
        unit, counts = tokens - 20 + torch.arange(12), torch.tensor([5, 7])
        x, weight = zeros(tokens, 2, dtype=dtype), torch.rand(12)
        x[-20:] = torch.randn(20, 2)
        w1, w2 = torch.randn(2, 3, 2).to(dtype), torch.randn(2, wide, 3).to(dtype)
        rest = (weight, counts, None, w1, None, w2, None, "silu", False)
        y = operators.grouped_mlp(x, unit, *rest)[0]
        few = x[-20:].clone()
        near = operators.grouped_mlp(few, unit - unit[0], *rest)[0]
        assert torch.equal(y[-20:], near)
        assert y[:-20].count_nonzero() == 0
        del y
        x, dy = zeros(tokens, wide, dtype=dtype), zeros(tokens, 2, dtype=dtype)
        dy[-20:] = torch.randn(20, 2)
        pre = torch.randn(operators.grouped_mlp(few, unit - unit[0], *rest[:-1], True)[1].shape).to(dtype)
        w1, w2 = w2.mT.contiguous(), w1.mT.contiguous()
        rest = (weight, counts, None, w1, w2, None, "silu", [True] + [False] * 5)
        d_x = operators.grouped_mlp_backward(dy, pre, x, unit, *rest)[0]
        few = dy[-20:].clone(), pre, x[-20:].clone(), unit - unit[0]
        near = operators.grouped_mlp_backward(*few, *rest)[0]
        assert torch.equal(d_x[-20:], near)
        assert d_x[:-20].count_nonzero() == 0

    def test_the_pre_activation(self, dtype):
        """Many rows of few tokens, all alike: the last has the results of the first."""
        wide = 4096
        rows = FAR // wide + 40
        unit, counts = torch.zeros(rows, dtype=torch.int64), torch.tensor([rows])
        x, w1, w2 = torch.randn(1, 2), torch.randn(1, wide, 2), torch.randn(1, 1, wide) / wide
        x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
        weight = torch.full((rows,), 1 / rows)
        _, pre = operators.grouped_mlp(x, unit, weight, counts, None, w1, None, w2, None, "silu", True)
        assert torch.equal(pre[rows - 1], pre[0])
        assert pre[0].count_nonzero() > 0
        needs = [False, True, False, False, False, False]
        dy = torch.ones(1, 1, dtype=dtype)
        d_weight = operators.grouped_mlp_backward(
            dy, pre, x, unit, weight, counts, None, w1, w2, None, "silu", needs
        )[1]
        assert d_weight[0] != 0
        assert (d_weight == d_weight[0]).all()

    @pytest.mark.parametrize("name", ["w1", "w2"])
    def test_the_gradients_of_weights(self, name, dtype):
        slots = FAR // (256 * 256) + 2
        w1, w2 = zeros(slots, 256, 256, dtype=dtype), zeros(slots, 256, 256, dtype=dtype)
        w1[-1], w2[-1] = torch.randn(256, 256) / 16, torch.randn(256, 256) / 16
        x, unit, weight, counts = (
            torch.randn(9, 256).to(dtype),
            torch.arange(9),
            torch.rand(9),
            torch.tensor([9]),
        )
        dy, slot = torch.randn(9, 256).to(dtype), torch.tensor([0])
        needs = [False, False, name == "w1", False, name == "w2", False]
        near = both(
            (x, unit, weight, counts, slot, w1[-1:].clone(), None, w2[-1:].clone(), None, "relu"), dy, needs
        )
        far = both((x, unit, weight, counts, slot + slots - 1, w1, None, w2, None, "relu"), dy, needs)
        at = 4 if name == "w1" else 6
        assert torch.equal(far[at][-1], near[at][0])
        assert far[at][:-1].count_nonzero() == 0
