from __future__ import annotations

import pytest
import torch.distributed as dist

from flexpert.core.errors import CheckpointError, DistributedError
from flexpert.parallel import heartbeat
from flexpert.parallel.agree import default_store
from flexpert.parallel.together import Ranks
from flexpert.testing import run_ranks


def fail_on(failing, kind):
    ranks = Ranks()

    def work():
        if ranks.rank in failing:
            raise kind(f"mine is {ranks.rank}")
        return ranks.rank

    try:
        return ranks.together(work), None
    except Exception as error:  # noqa: BLE001 - told to the test
        again = ranks.share(ranks.rank)  # the ranks still meet
        return type(error).__name__, str(error), again


@pytest.mark.parametrize(
    ("kind", "others"),
    [(CheckpointError, "CheckpointError"), (PermissionError, "OSError"), (KeyError, "RuntimeError")],
)
def test_where_one_fails_all_raise(kind, others):
    results = run_ranks(fail_on, 3, (1,), kind)
    assert results[1][0] == kind.__name__
    for name, text, again in (results[0], results[2]):
        assert name == others
        assert text.startswith("rank 1: ")
        assert "mine is 1" in text
        assert again == [0, 1, 2]


def test_each_that_fails_raises_its_own_and_the_others_the_first():
    texts = [text for _, text, _ in run_ranks(fail_on, 3, (1, 2), CheckpointError)]
    assert texts == ["rank 1: mine is 1", "mine is 1", "mine is 2"]


def share_unlike_values():
    ranks = Ranks()
    values = ranks.share({"name": "\u00e9" * 5000 * ranks.rank, "of": [ranks.rank, None, 0.1]})
    try:
        ranks.together(lambda: object() if ranks.rank else "text")
    except (TypeError, RuntimeError) as error:
        return values, str(error)


def test_values_of_any_length_arrive_whole_and_others_are_an_error_everywhere():
    want = [{"name": "\u00e9" * 5000 * rank, "of": [rank, None, 0.1]} for rank in range(2)]
    words = "Object of type object is not JSON serializable"
    assert run_ranks(share_unlike_values, 2) == [(want, f"rank 1: TypeError: {words}"), (want, words)]


def heartbeats():
    """Of these ranks, of others, and after it ended."""
    rank = dist.get_rank()
    group = dist.new_group([0, 1])
    beat = heartbeat.Heartbeat(default_store(), rank, [0, 1], 0.5, "test")
    found = Ranks(group).heartbeat is beat, heartbeat.heartbeat_of([0, 2])
    beat.stop()
    return (*found, Ranks(group).heartbeat)


def test_a_heartbeat_of_the_ranks_is_found():
    assert run_ranks(heartbeats, 2) == [(True, None, None)] * 2


def of_a_part():
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    rank = dist.get_rank()
    ranks = Ranks(groups[min(rank, 1)])
    with pytest.raises(DistributedError, match="no member"):
        Ranks(groups[0 if rank else 1])
    return ranks.rank, ranks.size, ranks.first(lambda: rank), ranks.together(lambda: rank)


def test_groups_of_some_ranks():
    assert run_ranks(of_a_part, 3) == [(0, 1, 0, [0]), (0, 2, 1, [1, 2]), (1, 2, 1, [1, 2])]


def test_one_process_alone():
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.share(3), ranks.together(lambda: 4)) == (0, 1, [3], [4])
