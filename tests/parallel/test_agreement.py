from __future__ import annotations

import pytest
import torch.distributed as dist

from flexpert.core.errors import CheckpointError, DistributedError
from flexpert.parallel.agreement import Ranks
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
