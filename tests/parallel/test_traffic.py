"""Counters equal the stated formulas, byte for byte."""

from __future__ import annotations

import pytest
import torch

from flexpert.parallel.traffic import Traffic
from flexpert.testing import run_ranks
from tests.parallel.transports import make_group, make_world

NODES = [0, 0, 1, 1, 1]


def test_links_are_told_apart_and_nothing_to_itself_counts():
    traffic = Traffic()
    traffic.add("all_to_all", [1, 10, 100, 0, 10000], rank=2, node_of=NODES)
    traffic.add("all_gather", [7] * 5, rank=0, node_of=NODES)
    assert traffic.snapshot() == {
        "all_to_all": {
            "inside": {"bytes": 10000, "messages": 1},
            "between": {"bytes": 11, "messages": 2},
        },
        "all_gather": {"inside": {"bytes": 7, "messages": 1}, "between": {"bytes": 21, "messages": 3}},
    }
    assert (traffic.inside, traffic.between) == (10007, 32)
    traffic.reset()
    assert traffic.snapshot() == {}
    assert (traffic.inside, traffic.between) == (0, 0)


def test_a_snapshot_does_not_change():
    traffic = Traffic()
    traffic.add("all_to_all", [1, 1], rank=0, node_of=[0, 0])
    before = traffic.snapshot()
    traffic.add("all_to_all", [1, 1], rank=0, node_of=[0, 0])
    assert before["all_to_all"]["inside"] == {"bytes": 1, "messages": 1}


def count_collectives(dtype, numel):
    group = make_world(2)
    size, results = group.size, {}
    shard = torch.ones(numel, dtype=dtype)
    calls = {
        "all_gather": lambda: group.all_gather(torch.empty(size * numel, dtype=dtype), shard),
        "reduce_scatter": lambda: group.reduce_scatter(shard.clone(), torch.ones(size * numel, dtype=dtype)),
        "all_reduce": lambda: group.all_reduce(shard.clone()),
    }
    for name, call in calls.items():
        call()
        assert set(group.traffic.snapshot()) == {name}
        results[name] = group.traffic.snapshot()[name]
        group.traffic.reset()
    return results


@pytest.mark.parametrize(("dtype", "numel"), [(torch.float32, 10), (torch.bfloat16, 7), (torch.int64, 2)])
def test_collectives_count_what_is_stated(dtype, numel):
    ranks, item = 4, dtype.itemsize
    results = run_ranks(count_collectives, ranks, dtype, numel)
    for rank, result in enumerate(results):
        whole = {
            "inside": {"bytes": numel * item, "messages": 1},
            "between": {"bytes": 2 * numel * item, "messages": 2},
        }
        assert result["all_gather"] == result["reduce_scatter"] == whole
        portion = [numel * (p + 1) // ranks - numel * p // ranks for p in range(ranks)]
        for link, peers in (
            ("inside", [rank ^ 1]),
            ("between", [p for p in range(4) if p // 2 != rank // 2]),
        ):
            sent = [portion[p] for p in peers] + [portion[rank]] * len(peers)
            assert result["all_reduce"][link] == {
                "bytes": sum(sent) * item,
                "messages": sum(count > 0 for count in sent),
            }
    total = sum(counter["bytes"] for result in results for counter in result["all_reduce"].values())
    assert total == 2 * (ranks - 1) * numel * item


def share_counters():
    traffic = Traffic()
    first, second = (make_group(name, [0, 1], 2, traffic) for name in ("first", "second"))
    for group in (first, second):
        group.all_gather(torch.empty(2), torch.ones(1))
    return traffic.inside


def test_groups_may_share_counters():
    assert run_ranks(share_counters, 2) == [8, 8]
