"""Rows to buffers and back against loops, natively and not; one is the other's adjoint."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.ops import buffers
from flexpert.ops.buffers import Buffers, from_buffers, to_buffers


@pytest.fixture(params=["as it is", "portable"])
def way(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(buffers, "_is_native", lambda rows: False)


def loop(rows, counts, form, chunk):
    """By (group, copy, expert of the group, row)."""
    first, height = form.part(chunk)
    segments = rows.split(counts)
    each, parts = len(counts) // form.groups, []
    for group in range(form.groups):
        for _ in range(form.copies):
            for segment in segments[group * each : (group + 1) * each]:
                part = segment[first : first + height]
                parts += [part, rows.new_zeros(height - len(part), rows.shape[1])]
    return torch.cat(parts)


SHAPES = st.tuples(
    st.sampled_from([1, 2, 3]),  # groups
    st.integers(1, 3),  # experts of each
    st.integers(1, 3),  # copies
    st.integers(1, 9),  # capacity
    st.integers(1, 4),  # degree
)


@settings(max_examples=150)
@given(
    shape=SHAPES,
    share=st.lists(st.floats(0, 1), min_size=9, max_size=9),
    size=st.sampled_from([1, 5, 16, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]),
    native=st.booleans(),
)
def test_any_shape(shape, share, size, dtype, native):
    groups, each, copies, capacity, degree = shape
    form = Buffers(groups, copies, capacity, degree)
    counts = [round(part * capacity) for part in share[: groups * each]]
    counts_E = torch.tensor(counts)
    rows = torch.randn(sum(counts), size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(buffers, "_is_native", lambda rows: False)
        sent = [to_buffers(rows, counts_E, form, chunk) for chunk in range(degree)]
        for chunk, part in enumerate(sent):
            assert torch.equal(part, loop(rows, counts, form, chunk))
        assert torch.equal(from_buffers(sent, counts_E, form), (rows.double() * copies).to(dtype))
        # <to(rows), other> = <rows, from(other)>
        other = [
            torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for part in sent
        ]
        back = from_buffers(other, counts_E, form)
        left = sum(float((a.double() * b.double()).sum()) for a, b in zip(sent, other, strict=True))
        right = float((rows.double() * back.double()).sum())
        assert abs(left - right) <= 0.02 * (1 + rows.numel()) ** 0.5 * copies


def test_many_rows_on_threads_and_strides(way):
    form, counts = Buffers(4, 2, 300, 1), [300, 0, 150, 299, 1, 2, 3, 300]
    rows = torch.randn(sum(counts), 64)
    want = loop(rows, counts, form, 0)
    turned = rows.T.contiguous().T
    assert torch.equal(to_buffers(turned, torch.tensor(counts), form, 0), want)
    assert torch.equal(from_buffers([want.T.contiguous().T], torch.tensor(counts), form), 2 * rows)
