"""Chunks part every segment, each row in one of them."""

from __future__ import annotations

import pytest
import torch

from flexpert import InputError
from flexpert.parallel.hierarchical import HierarchicalSplits
from flexpert.parallel.splits import Splits, chunk_counts, chunk_of, segments

COUNTS = [[0, 1, 7], [5, 0, 16]]


@pytest.mark.parametrize("degree", [1, 2, 3, 8, 20])
def test_chunks_are_the_stated_rows_of_each_segment(degree):
    counts = torch.tensor(COUNTS)
    starts, first = [], 0
    for n in COUNTS[0] + COUNTS[1]:
        starts.append((first, n))
        first += n
    seen = []
    for chunk in range(degree):
        want = [
            start + row
            for start, n in starts
            for row in range(n * chunk // degree, n * (chunk + 1) // degree)
        ]
        begin, sizes = chunk_of(counts, chunk, degree)
        rows = segments(torch.tensor([start for start, _ in starts]).view_as(counts) + begin, sizes)
        assert rows.dtype == torch.int64
        assert rows.tolist() == want
        assert sizes.tolist() == chunk_counts(COUNTS, chunk, degree)
        assert sum(map(sum, sizes.tolist())) == len(want)
        seen += want
    assert sorted(seen) == list(range(first))


def test_chunks_of_splits():
    splits = Splits(COUNTS, [[3, 3, 3], [1, 0, 1]])
    part = splits.chunk(1, 2)
    assert part == Splits([[0, 1, 4], [3, 0, 8]], [[2, 2, 2], [1, 0, 1]])
    relayed = HierarchicalSplits(splits.sent, splits.received, [COUNTS, COUNTS]).chunk(1, 2)
    assert relayed == HierarchicalSplits(part.sent, part.received, [part.sent, part.sent])


def test_chunks_are_worked_out_once():
    splits = Splits([[1, 6]], [[2, 3]])
    assert splits.chunk(0, 1) is splits
    assert splits.chunk(1, 3) is splits.chunk(1, 3)
    assert (splits.forward.send, splits.forward.receive) == (splits.reverse.receive, splits.reverse.send)
    assert (splits.forward.send, splits.forward.receive) == ([7], [5])
    assert (splits.forward.leaving, splits.forward.arriving) == (7, 5)


@pytest.mark.parametrize(("chunk", "degree"), [(2, 2), (-1, 2), (0, 0)])
def test_chunks_that_are_none(chunk, degree):
    with pytest.raises(InputError, match=f"chunk={chunk} of degree={degree}; chunks are 0 to degree - 1"):
        chunk_counts(COUNTS, chunk, degree)


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [
        ([5, 0, 3, 40], [2, 3, 0, 1]),
        ([7, 7, 2], [0, 3, 3]),  # a row may be in several
        ([[9, 1], [4, 0]], [[1, 2], [0, 4]]),
        ([1, 8], [0, 0]),
        ([], []),
        ([[], []], [[], []]),
    ],
)
def test_segments_are_those_of_a_loop(starts, lengths):
    starts, lengths = torch.tensor(starts, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
    for first, sizes in ((starts, lengths), (starts.swapaxes(0, -1), lengths.swapaxes(0, -1))):
        pairs = zip(first.flatten().tolist(), sizes.flatten().tolist(), strict=True)
        index = segments(first, sizes)
        assert index.dtype == torch.int64
        assert index.tolist() == [start + row for start, length in pairs for row in range(length)]
