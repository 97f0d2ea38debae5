"""Products over the rows of one expert: padding, orientation, and rows that stay apart."""

from __future__ import annotations

import pytest
import torch

from flexpert.ops.products import outer_product, pad_rows, padded, row_product, segments

HALVES = [torch.bfloat16, torch.float16]


def test_half_precision_meets_few_row_counts():
    sizes = [padded(count, torch.bfloat16) for count in range(1, 1000)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 6 + 31  # 1, 2, 4, ..., 32, then multiples of 32
    assert [padded(count, torch.float32) for count in (1, 7, 33)] == [1, 7, 33]


def test_segments_skip_what_is_empty_or_elsewhere():
    counts, slots = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0, -1, 0])
    assert list(segments(counts, None)) == [(0, 0, 2), (2, 2, 5), (3, 5, 6)]
    assert list(segments(counts, slots)) == [(1, 0, 2), (0, 5, 6)]
    assert list(segments(counts, slots, absent=True)) == [(1, 0, 2), (-1, 2, 5), (0, 5, 6)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("size", [(1, 1, 1), (7, 17, 33), (40, 64, 16)])
def test_row_product(size, dtype, bias, turned):
    rows, inner, columns = size
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).t()
    c = torch.randn(columns).to(dtype) if bias else None
    want = a.double() @ b.double() + (c.double() if bias else 0)
    out = torch.full((rows, columns), float("nan"), dtype=dtype)
    got = row_product(a, b, c, turned=turned)
    filled = row_product(a, b, c, out, turned=turned)
    assert filled.data_ptr() == out.data_ptr()
    assert torch.equal(got, out)
    tolerance = 3 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("inner", [3, 17, 33, 34, 68, 76, 513])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_bad_row_spoils_no_other(dtype, inner, turned):
    a, b = torch.randn(40, inner).to(dtype), torch.randn(inner, 17).to(dtype)
    want = row_product(a, b, turned=turned)
    others = torch.arange(40) != 21
    for bad in (float("nan"), float("inf")):
        a[21] = bad
        assert torch.equal(row_product(a, b, turned=turned)[others], want[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outer_product_over_padded_rows(dtype):
    a, b = torch.randn(35, 5).to(dtype), torch.randn(35, 6).to(dtype)
    want = a.double().t() @ b.double()
    out = torch.full((5, 6), float("nan"), dtype=dtype)
    outer_product(pad_rows(a), pad_rows(b), out, accumulate=False)
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    assert (out.double() - want).norm() <= tolerance * want.norm()
    outer_product(pad_rows(a), pad_rows(b), out, accumulate=True)
    assert (out.double() - 2 * want).norm() <= tolerance * 2 * want.norm()
