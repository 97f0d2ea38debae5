"""Collectives on groups of any ranks, of every dtype, against their definitions."""

from __future__ import annotations

import copy
import re
import time

import pytest
import torch
from torch import distributed as dist

from flexpert import DistributedError, InputError
from flexpert.parallel.group import Group
from flexpert.testing import run_ranks
from tests.parallel.transports import make_group, make_world

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def inputs(position, dtype, shape, contiguous):
    """Small whole numbers, exact in every dtype, other ones on each rank."""
    generator = torch.Generator().manual_seed(position)
    x = torch.randint(0, 2 if dtype == torch.bool else 8, shape, generator=generator).to(dtype)
    if contiguous:
        return x
    transposed = x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert len(x) < 2 or not transposed.is_contiguous()
    return transposed


def same(got, want):
    bits = (x.contiguous().view(torch.uint8) for x in (got, want))  # torch.equal knows no float8
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(*bits)


def check_moves(group, dtype, contiguous, async_op):
    """all_to_all and all_gather, with even, uneven and no rows."""
    size, me = group.size, group.rank
    for splits in [None, lambda s, d: (3 * s + d) % 4, lambda s, d: 0, lambda s, d: 5 * (d == size - 1)]:
        count = splits or (lambda s, d: 2)
        totals = [sum(count(s, d) for d in range(size)) for s in range(size)]
        everybody = [inputs(s, dtype, (totals[s], 2, 3), contiguous) for s in range(size)]
        send, receive = [count(me, d) for d in range(size)], [count(s, me) for s in range(size)]
        output = torch.empty(sum(receive), 2, 3, dtype=dtype)
        given = (None, None) if splits is None else (receive, send)
        group.all_to_all(output, everybody[me], *given, async_op=async_op).wait()
        parts = [everybody[s].split([count(s, d) for d in range(size)])[me] for s in range(size)]
        assert same(output, torch.cat(parts)), (dtype, send, receive)
    for rows in (3, 0):
        everybody = [inputs(s, dtype, (rows, 2, 3), contiguous) for s in range(size)]
        output = torch.empty(rows * size, 2, 3, dtype=dtype)
        group.all_gather(output, everybody[me], async_op=async_op).wait()
        assert same(output, torch.cat(everybody))


def check_reductions(group, dtype, contiguous, async_op):
    size, me = group.size, group.rank
    for shape in [(3, 2, 3), (0, 2, 3), (3, 700, 3)]:  # the last one goes round in a ring
        everybody = torch.stack([inputs(s, dtype, shape, True) for s in range(size)])
        wide = torch.float64 if dtype.is_floating_point else torch.int64
        wants = {"max": everybody.to(wide).amax(0), "min": everybody.to(wide).amin(0)}
        if dtype != torch.bool:
            wants["sum"] = everybody.to(wide).sum(0)
        if dtype.is_floating_point:
            wants["avg"] = wants["sum"] / size
        for op, want in wants.items():
            x = inputs(me, dtype, shape, contiguous)
            group.all_reduce(x, op, async_op=async_op).wait()
            if op == "avg":
                torch.testing.assert_close(x, want.to(dtype))
            else:
                assert same(x, want.to(dtype)), (dtype, op, shape)
    if dtype == torch.bool:
        return
    everybody = [inputs(s, dtype, (2 * size, 3), contiguous) for s in range(size)]
    output = torch.empty(2, 3, dtype=dtype)
    group.reduce_scatter(output, everybody[me], async_op=async_op).wait()
    want = torch.stack(everybody).to(torch.float64)[:, 2 * me : 2 * me + 2].sum(0).to(dtype)
    assert same(output, want), dtype


def check_all_dtypes(ranks):
    group = make_group("some", ranks)
    if group is None:
        return "not in it"
    for contiguous in (True, False):
        for async_op in (True, False):
            for dtype in DTYPES:
                check_moves(group, dtype, contiguous, async_op)
                check_reductions(group, dtype, contiguous, async_op)
            for dtype in FLOAT8:
                check_moves(group, dtype, contiguous, async_op)
    group.barrier()
    return group.rank


@pytest.mark.parametrize(
    ("world_size", "ranks"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (4, [1, 3]), (4, [0, 2, 3]), (4, [2])],
)
def test_collectives_are_their_definitions(world_size, ranks):
    results = run_ranks(check_all_dtypes, world_size, ranks)
    assert results == [ranks.index(r) if r in ranks else "not in it" for r in range(world_size)]


def report_refusals():
    group, x = make_world(), torch.ones(4, 3)
    calls = [
        lambda: group.all_to_all(torch.empty(4, 3), torch.ones(3, 3)),
        lambda: group.all_to_all(torch.empty(4, 3), x, [1, 2], [2, 2]),
        lambda: group.all_to_all(torch.empty(4, 3), x, [2, 2], [2, 1, 1]),
        lambda: group.all_to_all(torch.empty(4, 3), x, [1, 3] if group.rank == 0 else [3, 1], [2, 2]),
        lambda: group.all_to_all(torch.empty(4, 2), x),
        lambda: group.all_to_all(torch.empty(4, 3, dtype=torch.float64), x),
        lambda: group.all_to_all(torch.empty(3, 4).T, x),
        lambda: group.all_gather(torch.empty(4, 3), x),
        lambda: group.reduce_scatter(torch.empty(3, 3), x),
        lambda: group.reduce_scatter(torch.empty(2, 3, dtype=torch.bool), x.bool()),
        lambda: group.all_reduce(x.to(torch.float8_e4m3fn)),
        lambda: group.all_reduce(x.bool()),
        lambda: group.all_reduce(x.long(), "avg"),
        lambda: group.all_reduce(x, "mean"),
    ]
    messages = []
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        messages.append(str(caught.value))
    return messages, group.traffic.snapshot()


def test_misfits_are_refused_before_anything_is_sent():
    (messages, traffic), _ = run_ranks(report_refusals, 2)
    assert messages == [
        "all_to_all: 3 rows of input for 2 ranks; pass input_splits",
        "all_to_all: output_splits=[1, 2] for 2 ranks and 4 rows of output",
        "all_to_all: input_splits=[2, 1, 1] for 2 ranks and 4 rows of input",
        "all_to_all: 2 rows to itself, 1 from itself",
        "all_to_all: output has rows (2,), input (3,)",
        "all_to_all: output is torch.float64 on cpu, input torch.float32 on cpu",
        "all_to_all: output is written in place and must be contiguous",
        "all_gather: 2 times (4, 3) on the first dimension expected, got (4, 3)",
        "reduce_scatter: 2 times (3, 3) on the first dimension expected, got (4, 3)",
        "reduce_scatter: a sum of bools is none; use op='max', or convert to an integer dtype",
        "all_reduce: torch.float8_e4m3fn cannot be summed or compared; convert it before",
        "all_reduce: a sum of bools is none; use op='max', or convert to an integer dtype",
        "all_reduce: op='avg' of torch.int64; use 'sum', or convert it before",
        "all_reduce: op='mean'; there are sum, max, min, avg",
    ]
    assert traffic == {}


def report_bad_groups():
    pair = dist.new_group([0, 1])
    cases = [
        ((0, 1), None, (0, 0)),
        ((0, 1), pair, (0,)),
        ((0, 1), pair, (0, 0)),
        ((1, 0), pair, (0, 0)),
        ((0, 1, 2), pair, (0, 0, 0)),
    ]
    return [told(lambda: repr(Group("some", *case))) for case in cases]  # noqa: B023 - called at once


def told(call):
    try:
        return call()
    except DistributedError as error:
        return str(error)


def test_groups_must_be_what_is_said_of_them():
    member, _, outsider = run_ranks(report_bad_groups, 3)
    assert member == [
        "group 'some' of ranks (0, 1) needs a process group",
        "group 'some': 1 nodes given for 2 ranks",
        "Group('some', ranks=(0, 1), rank=0)",
        "group 'some': ranks (1, 0) given with a process group of (0, 1)",
        "group 'some': ranks (0, 1, 2) given with a process group of (0, 1)",
    ]
    assert outsider[2] == "group 'some': this process is none of the ranks (0, 1)"


def keep_only_pending():
    group, rank = make_world(), dist.get_rank()
    output = torch.empty(200_000)
    if rank == 0:
        dist.barrier()  # so that the others have started theirs, and lost their inputs, long before
    pending = group.all_to_all(output, torch.full((200_000,), float(rank)), async_op=True)
    if rank != 0:
        dist.barrier()
    noise = [torch.full((200_000,), -1.0) for _ in range(8)]  # takes memory that is free
    pending.wait()
    pending.wait()
    return output.unique_consecutive().tolist(), len(noise)


def test_buffers_live_until_the_wait():
    assert run_ranks(keep_only_pending, 2) == [([0.0, 1.0], 8)] * 2


def lose_a_rank():
    group = make_group("pair", [0, 2])
    if group is None:
        return None
    if dist.get_rank() == 2:
        time.sleep(1)
        dist.destroy_process_group()  # as if it had ended
        return None
    pending = group.all_to_all(torch.empty(2), torch.ones(2), async_op=True)
    with pytest.raises(DistributedError) as caught:
        pending.wait()
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(DistributedError):
        group.all_reduce(torch.ones(2))
    return str(caught.value)


def test_a_lost_rank_is_an_error_that_says_where():
    (message, _, _) = run_ranks(lose_a_rank, 3)
    pattern = (
        r"all_to_all on group 'pair' \(ranks \(0, 2\), this is 0\) failed after \d+\.\d s: .*(peer|timed)"
    )
    assert re.match(pattern, message.replace("\n", " "), re.IGNORECASE), message


def copy_group():
    group = make_world()
    layer = torch.nn.Linear(1, 1)
    layer.group = group
    assert copy.deepcopy(layer).group is group


def test_a_copied_module_keeps_its_group():
    run_ranks(copy_group, 2)


def test_a_group_of_one_needs_no_process_group():
    group = Group("alone", [5], None, [0])
    x, output = torch.arange(6.0).view(3, 2), torch.empty(3, 2)
    for collective in (group.all_to_all, group.all_gather, group.reduce_scatter):
        output.zero_()
        collective(output, x).wait()
        assert torch.equal(output, x)
    group.all_reduce(output, "avg").wait()
    assert torch.equal(output, x)
    group.barrier()
    assert (group.rank, group.size, group.ranks) == (0, 1, (5,))
    assert group.traffic.inside == group.traffic.between == 0


def reduce_with_history():
    group = make_world()
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    group.all_reduce(y)
    output = torch.empty(2)
    group.all_to_all(output, x * 3)
    assert not output.requires_grad
    return y.tolist(), output.tolist()


def test_autograd_is_not_asked():
    assert run_ranks(reduce_with_history, 2) == [([4.0, 4.0], [3.0, 3.0])] * 2
