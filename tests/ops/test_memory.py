"""Large buffers: what they are, with and without the advice to the system."""

from __future__ import annotations

import pytest
import torch

from flexpert.ops import memory


@pytest.mark.parametrize("advised", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (2, 5), (1 << 12, 1 << 10)])
def test_empty(shape, advised, monkeypatch):
    calls = []
    real = memory._madvise

    def watch(start, size, advice):
        calls.append((start, size))
        return real(start, size, advice) if real is not None else 0

    monkeypatch.setattr(memory, "_madvise", watch if advised else None)
    buffer = memory.empty(torch.ones(1, dtype=torch.bfloat16), shape)
    assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == (shape, torch.bfloat16, True)
    assert bool(calls) == (advised and buffer.nbytes >= 1 << 22)
    for start, size in calls:  # whole pages inside the buffer
        assert start % (1 << 21) == size % (1 << 21) == 0
        assert buffer.data_ptr() <= start
        assert start + size <= buffer.data_ptr() + buffer.nbytes
    buffer.fill_(1)
    assert buffer.sum(dtype=torch.float32) == buffer.numel()
