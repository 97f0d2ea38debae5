"""Large buffers: what they are, and whose memory they use again."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexpert.ops import memory

LIKE = torch.ones(1, dtype=torch.bfloat16)
LARGE = (10 << 10, 1 << 10)  # ten pages


@pytest.fixture(autouse=True)
def _own_blocks(monkeypatch):
    monkeypatch.setattr(memory, "_blocks", memory._Blocks())


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (2, 5), LARGE, (3, 1 << 21)])
def test_empty(shape, mapped, monkeypatch):
    monkeypatch.setattr(memory, "_enabled", mapped and memory._enabled)
    buffer = memory.empty(LIKE, shape)
    assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == (shape, torch.bfloat16, True)
    assert buffer.data_ptr() % 64 == 0
    buffer.fill_(1)
    assert buffer.sum(dtype=torch.float32) == buffer.numel()


needs_blocks = pytest.mark.skipif(not memory._enabled, reason="blocks are mapped on Linux only")


@needs_blocks
def test_the_next_buffer_of_like_size_gets_the_memory():
    first = memory.empty(LIKE, LARGE)
    place, other = first.data_ptr(), memory.empty(LIKE, LARGE)
    assert other.data_ptr() != place
    del first
    smaller = memory.empty(LIKE.float(), (9 << 10, LARGE[1] // 2))
    assert (smaller.data_ptr(), smaller.dtype) == (place, torch.float32)


@needs_blocks
def test_a_view_keeps_the_memory():
    tail = memory.empty(LIKE, LARGE)[5:].fill_(3)
    gc.collect()
    other = memory.empty(LIKE, LARGE).fill_(1)
    assert bool((tail == 3).all())
    assert bool((other == 1).all())


@needs_blocks
def test_no_more_blocks_wait_than_were_in_use():
    size = 10 * memory.PAGE
    for rows in (10, 5, 20):  # one at a time
        memory.empty(LIKE, (rows << 10, 1 << 10))
    assert [len(block) for block in memory._blocks.waiting] == [2 * size]
    both = [memory.empty(LIKE, (rows << 10, 1 << 10)) for rows in (10, 20)]
    assert (memory._blocks.live, memory._blocks.most_live) == (3 * size, 3 * size)
    both.clear()
    assert sorted(len(block) for block in memory._blocks.waiting) == [size, 2 * size]
    assert memory._blocks.live == 0


@needs_blocks
def test_gradients_of_a_step_lie_where_the_last_ones_did():
    w = torch.nn.Parameter(torch.zeros(LARGE, dtype=torch.bfloat16))
    places = []
    for _ in range(3):
        w.grad = None
        w.grad = memory.empty(w, LARGE).zero_()
        places.append(w.grad.data_ptr())
    assert len(set(places)) == 1


def test_huge_pages_are_asked_for_once_and_change_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_seen", {})
    weight = torch.nn.Parameter(torch.arange(3 << 20, dtype=torch.float32))
    for _ in range(2):
        memory.prefer_huge_pages(weight)
    assert memory._seen == ({weight.data_ptr(): weight.nbytes} if memory._enabled else {})
    assert torch.equal(weight.detach(), torch.arange(3 << 20, dtype=torch.float32))
    memory.prefer_huge_pages(weight[:10])  # small, and a view is not the weight
    memory.prefer_huge_pages(torch.nn.Parameter(torch.empty(1 << 30, device="meta")))
    assert len(memory._seen) == int(memory._enabled)


def test_a_fake_tensor_has_no_pages(monkeypatch):
    monkeypatch.setattr(memory, "_seen", {})
    with FakeTensorMode():
        memory.prefer_huge_pages(torch.nn.Parameter(torch.empty(3 << 20)))
    assert memory._seen == {}
