"""What only the two-dimensional exchange has: its groups, its messages, its two alignments."""

from __future__ import annotations

import pytest
import torch

from flexpert import DistributedError
from flexpert.parallel.hierarchical import Alignment, Hierarchical, transposed
from flexpert.testing import run_ranks
from tests.parallel.transports import make_grid, make_group, matrices, rows_to_send


@pytest.mark.parametrize(
    "sizes", [[[2, 2, 2]] * 2, [[1, 0, 3], [2, 2, 0]], [[0, 0], [0, 0]], [[4], [1]], [[2, 1]]]
)
def test_align_orders_segments_by_the_other_place(sizes):
    segments = [[torch.rand(size, 3) for size in row] for row in sizes]
    rows = torch.cat([segment for row in segments for segment in row])
    want = torch.cat([row[b] for b in range(len(sizes[0])) for row in segments])
    assert torch.equal(Alignment(sizes)(rows).reshape(rows.shape), want)
    assert torch.equal(Alignment(transposed(sizes))(want).reshape(rows.shape), rows)


def count_messages(places):
    algorithm = Hierarchical(*make_grid(places))
    traffic, matrix = algorithm.inside.traffic, matrices(algorithm.group.size, 2, 5)["random"] + 1
    rank, results = algorithm.group.rank, []
    splits = algorithm.exchange_counts(matrix[rank])
    results.append(traffic.snapshot()["all_to_all"])
    traffic.reset()
    arrived = algorithm.start(rows_to_send(matrix, rank), splits).wait()
    results.append(traffic.snapshot()["all_to_all"])
    traffic.reset()
    algorithm.start(arrived, splits, reverse=True).wait()
    return [*results, traffic.snapshot()["all_to_all"]]


@pytest.mark.parametrize(("world_size", "places"), [(4, 2), (6, 3), (6, 2)])
def test_messages_are_few_and_bytes_between_nodes_those_of_linear(world_size, places):
    nodes, row_bytes = world_size // places, 2 * 4
    matrix = (matrices(world_size, 2, 5)["random"] + 1).sum(2)
    node = torch.arange(world_size) // places
    results = run_ranks(count_messages, world_size, places)
    for rank, (counts, forth, back) in enumerate(results):
        for traffic in (counts, forth, back):
            assert traffic["inside"]["messages"] == places - 1
            assert traffic["between"]["messages"] == nodes - 1
        # Inside: what this rank has for other places, on any node. Back: what it had passed on.
        at_other_place = torch.arange(world_size) % places != rank % places
        assert forth["inside"]["bytes"] == int(matrix[rank, at_other_place].sum()) * row_bytes
        peers = (node == node[rank]) & (torch.arange(world_size) != rank)
        relayed = matrix[peers][:, ~at_other_place]
        assert back["inside"]["bytes"] == int(relayed.sum()) * row_bytes
        assert counts["between"]["bytes"] == (nodes - 1) * places * 2 * 8
    across = int(matrix[node[:, None] != node].sum()) * row_bytes
    for direction in (1, 2):
        assert sum(result[direction]["between"]["bytes"] for result in results) == across


def report_bad_groups():
    world, inside, between = make_grid(2)
    odd = make_group("odd", [0, 3]) or make_group("odd", [1, 2])
    make_group("odd", [1, 2]) if odd.ranks == (0, 3) else None
    messages = []
    for groups in ((world, between, inside), (world, inside, odd), (inside, inside, between)):
        with pytest.raises(DistributedError) as caught:
            Hierarchical(*groups)
        messages.append(str(caught.value))
    return messages


def test_groups_must_be_nodes_and_peers():
    first, *_ = run_ranks(report_bad_groups, 4)
    assert first == [
        "2dh on ranks (0, 1, 2, 3): rank 0 has inside=(0, 2) and between=(0, 1); (0, 1) and (0, 2) expected",
        "2dh on ranks (0, 1, 2, 3): rank 0 has inside=(0, 1) and between=(0, 3); (0, 1) and (0, 2) expected",
        "2dh on ranks (0, 1): rank 0 has inside=(0, 1) and between=(0, 2); (0, 1) and (0,) expected",
    ]


def phases_under_way():
    """The phases between nodes of all chunks begin with the first wait."""
    algorithm = Hierarchical(*make_grid(2))
    matrix = matrices(4, 1, 6)["even"]
    splits, rank, traffic = algorithm.known(matrix), algorithm.group.rank, algorithm.between.traffic
    rows = [rows_to_send(matrix, rank, i, 2) for i in range(2)]

    def messages():
        return traffic.snapshot()["all_to_all"]["between"]["messages"]

    forth = [algorithm.start(rows[i], splits, chunk=i, degree=2) for i in range(2)]
    seen = [messages()]
    arrived = [forth[0].wait()]
    seen.append(messages())
    arrived.append(forth[1].wait())
    back = [algorithm.start(arrived[i], splits, chunk=i, degree=2, reverse=True) for i in range(2)]
    seen.append(messages())
    assert all(torch.equal(pending.wait(), rows[i]) for i, pending in enumerate(back))
    return seen


def test_slow_phases_of_later_chunks_begin_with_the_first_wait():
    assert run_ranks(phases_under_way, 4) == [[0, 2, 4]] * 4
