"""Native buffers: the bits of PyTorch's operators on every instruction set, and no call that does not fit."""

from __future__ import annotations

import pytest
import torch

from flexpert.core.errors import InputError
from flexpert.ops import buffers
from flexpert.ops.buffers import Buffers, from_buffers, to_buffers
from flexpert.ops.cpu import buffers as native

pytestmark = [pytest.mark.usefixtures("live", "poisoned"), pytest.mark.each_cap]

FORM, COUNTS = Buffers(2, 2, 9, 2), torch.tensor([9, 0, 4, 1])


def both_ways(rows, others, monkeypatch):
    """Buffers of rows, and rows of other buffers, natively and by PyTorch's operators."""
    for is_native in (True, False):
        monkeypatch.setattr(buffers, "_is_native", lambda _, answer=is_native: answer)
        sent = [to_buffers(rows, COUNTS, FORM, chunk) for chunk in range(FORM.degree)]
        yield [*sent, from_buffers(others, COUNTS, FORM)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 16, 65])
def test_bits_of_plain_pytorch(size, dtype, monkeypatch):
    rows = torch.randn(14, size).to(dtype)
    others = [torch.randn(4 * 2 * FORM.part(chunk)[1], size).to(dtype) for chunk in range(2)]
    mine, plain = both_ways(rows, others, monkeypatch)
    assert all(map(torch.equal, mine, plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(threads, dtype):
    form, counts = Buffers(2, 3, 200), torch.tensor([200, 0, 77, 199])
    rows, others = torch.randn(476, 33).to(dtype), torch.randn(4 * 3 * 200, 33).to(dtype)
    results = []
    for number in (1, 2, 3, 7):
        threads(number)
        results.append((to_buffers(rows, counts, form, 0), from_buffers([others], counts, form)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_what_is_not_there_is_not_read():
    """Past the rows of an expert buffers hold zeros when sent, and anything when they come back."""
    sent = to_buffers(torch.ones(14, 3), COUNTS, Buffers(2, 1, 9), 0)
    assert float(sent.sum()) == 14 * 3
    sent[sent == 0] = torch.nan
    assert torch.equal(from_buffers([sent], COUNTS, Buffers(2, 1, 9)), torch.ones(14, 3))


@pytest.mark.parametrize("counts", [[9, 0, 4, 0], [9, 0, 4, 2], [10, -1, 4, 1]])
def test_counts_that_do_not_fit_the_rows_are_refused(counts):
    with pytest.raises(InputError, match="fill_buffers: counts_E does not add up to the rows"):
        to_buffers(torch.ones(14, 3), torch.tensor(counts), FORM, 0)


def test_buffers_of_another_size_are_refused():
    with pytest.raises(InputError, match=r"read_buffers: buffers_MD is torch.float32 \(8, 3\), not"):
        native.move("read_buffers", torch.ones(14, 3), torch.ones(8, 3), COUNTS, (2, 2), (0, 4))
