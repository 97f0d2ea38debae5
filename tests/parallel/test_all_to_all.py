"""Each row arrives where and in the order it should, by either algorithm, in chunks, forward and back."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from flexpert import DistributedError, InputError
from flexpert.parallel.all_to_all import Linear, all_to_all
from flexpert.parallel.codec import BF16, FP8
from flexpert.parallel.group import Group
from flexpert.parallel.splits import Splits
from flexpert.testing import run_ranks
from tests.parallel.transports import (
    make_algorithm,
    make_group,
    make_world,
    matrices,
    rows_to_arrive,
    rows_to_send,
)

# Worlds with the ranks per node of a 2DH.
WORLDS = [("linear", 1, 1), ("linear", 2, 1), ("linear", 3, 1), ("linear", 4, 2)]
WORLDS += [("2dh", 4, 2), ("2dh", 3, 1), ("2dh", 3, 3), ("2dh", 6, 2), ("2dh", 6, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]


def send_both_ways(algorithm, matrix, degree, dtype):
    """All chunks forward, then all back."""
    rank, chunks = algorithm.group.rank, range(degree)
    header = torch.tensor([rank, -7])
    headers, splits = algorithm.exchange_counts_with_header(header, matrix[rank])
    assert headers.tolist() == [[p, -7] for p in range(algorithm.group.size)]
    assert splits == algorithm.exchange_counts(matrix[rank]) == algorithm.known(matrix)
    assert splits.sent == matrix[rank].tolist()
    assert splits.received == matrix[:, rank].tolist()
    call = {"splits": splits, "degree": degree}
    sent = [rows_to_send(matrix, rank, i, degree).to(dtype) for i in chunks]
    forth = [algorithm.start(sent[i], chunk=i, **call) for i in chunks]
    arrived = [pending.wait() for pending in forth]
    for i in chunks:
        assert arrived[i].dtype == dtype
        assert torch.equal(arrived[i], rows_to_arrive(matrix, rank, i, degree).to(dtype)), (i, degree)
        assert forth[i].wait() is arrived[i]
    back = [algorithm.start(arrived[i], chunk=i, reverse=True, **call) for i in chunks]
    for i in chunks:
        assert torch.equal(back[i].wait(), sent[i]), (i, degree)


def check_exchanges(name, places):
    algorithm = make_algorithm(name, places)
    assert algorithm.name == name
    for seed, classes in enumerate((1, 3)):
        for case, matrix in matrices(algorithm.group.size, classes, seed).items():
            for degree in (1, 2, 5) if case == "random" else (3,):
                send_both_ways(algorithm, matrix, degree, DTYPES[(seed + degree) % len(DTYPES)])


@pytest.mark.parametrize(("name", "world_size", "places"), WORLDS)
def test_rows_arrive_and_return(name, world_size, places):
    run_ranks(check_exchanges, world_size, name, places)


def interleave(name):
    """The order of a pipeline: rows of a chunk go back while later ones still come."""
    algorithm = make_algorithm(name)
    rank, degree = algorithm.group.rank, 4
    for seed in range(5):
        matrix = matrices(4, 2, seed)["random"]
        call = {"splits": algorithm.known(matrix), "degree": degree}
        sent = [rows_to_send(matrix, rank, i, degree) for i in range(degree)]
        forth = [algorithm.start(sent[i], chunk=i, **call) for i in range(degree)]
        back = []
        for i in range(degree):
            rows = forth[i].wait()
            back.append(algorithm.start(-rows, chunk=i, reverse=True, **call))
        for i in (2, 0, 3, 1):
            assert torch.equal(back[i].wait(), -sent[i])


@pytest.mark.parametrize("name", ["linear", "2dh"])
def test_chunks_of_both_directions_may_be_under_way_together(name):
    run_ranks(interleave, 4, name)


def exchange_among(ranks):
    group = make_group("some", ranks)
    if group is not None:
        algorithm = Linear(group)
        for matrix in matrices(group.size, 2, 0).values():
            send_both_ways(algorithm, matrix, 2, torch.float32)
        x, splits = check_gradient(algorithm, 0)
        assert len(x) == sum(map(sum, splits.sent))


def test_strict_subgroups_forward_and_backward():
    run_ranks(exchange_among, 4, [1, 3])


def check_gradient(algorithm, seed):
    """d/dx of sum over ranks of c y^2 / 2, by hand: c x where each row went; and the second derivative."""
    group, matrix = algorithm.group, matrices(algorithm.group.size, 2, seed)["random"]
    rank, size = group.rank, group.size
    splits = algorithm.known(matrix)
    x = (rows_to_send(matrix, rank).double() + 1).requires_grad_()
    y = all_to_all(x, algorithm, splits)
    assert torch.equal(y, rows_to_arrive(matrix, rank).double() + 1)
    (grad,) = torch.autograd.grad((rank + 1) * y.square().sum() / 2, x, create_graph=True)
    destination = torch.arange(size).repeat_interleave(matrix[rank].sum(1))
    assert torch.equal(grad, (destination[:, None] + 1) * x)
    weight = torch.rand(grad.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    (second,) = torch.autograd.grad((grad * weight).sum(), x)
    assert torch.equal(second, (destination[:, None] + 1) * weight)
    return x, splits


def check_gradients(name):
    algorithm = make_algorithm(name)
    for seed in range(3):
        check_gradient(algorithm, seed)


@pytest.mark.parametrize("name", ["linear", "2dh"])
def test_the_gradient_goes_back_and_so_does_its_own(name):
    run_ranks(check_gradients, 4, name)


def exchange_encoded(name, codec):
    """What arrives is what the codec makes of what was sent, gradients too."""
    algorithm = make_algorithm(name)
    rank, matrix = algorithm.group.rank, matrices(4, 2, 1)["random"]
    splits = algorithm.known(matrix)

    def rows(source):
        generator = torch.Generator().manual_seed(source)
        return torch.randn(int(matrix[source].sum()), 6, generator=generator)

    def through(x):
        return codec.decode(codec.encode(x), x.dtype, x.shape[1])

    x = rows(rank).requires_grad_()
    y = all_to_all(x, algorithm, splits, codec)
    parts = [rows(s).split(matrix[s].sum(1).tolist())[rank] for s in range(4)]
    assert torch.equal(y, through(torch.cat(parts)))
    grad = torch.randn(y.shape)
    y.backward(grad)
    plain = algorithm.start(through(grad), splits, reverse=True).wait()
    assert torch.equal(x.grad, plain)


@pytest.mark.parametrize("codec", [BF16, FP8], ids=lambda codec: codec.name)
@pytest.mark.parametrize("name", ["linear", "2dh"])
def test_rows_travel_in_the_form_of_the_codec(name, codec):
    run_ranks(exchange_encoded, 4, name, codec)


def exchange_views(name):
    """Rows that are not contiguous, and rows of several dimensions or none."""
    algorithm = make_algorithm(name)
    rank, matrix = algorithm.group.rank, matrices(4, 2, 2)["random"]
    splits = algorithm.known(matrix)
    sent, arriving = rows_to_send(matrix, rank), rows_to_arrive(matrix, rank)
    for view in (
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat(1, 2)[:, 1:3],
        lambda x: x[:, 0],
        lambda x: x.view(-1, 1, 2).expand(-1, 3, -1),
        lambda x: x[:, :0],
    ):
        assert torch.equal(algorithm.start(view(sent), splits).wait(), view(arriving))


@pytest.mark.parametrize("name", ["linear", "2dh"])
def test_rows_of_any_shape_and_stride(name):
    run_ranks(exchange_views, 4, name)


def report_refusals(name):
    algorithm = make_algorithm(name)
    splits = algorithm.known(torch.ones(4, 4, 1, dtype=torch.int64))
    calls = [
        lambda: algorithm.exchange_counts(torch.ones(3, 2, dtype=torch.int64)),
        lambda: algorithm.exchange_counts(torch.ones(4, 2)),
        lambda: algorithm.exchange_counts_with_header(torch.ones(1, 1).long(), torch.ones(4, 2).long()),
        lambda: algorithm.start(torch.ones(5, 2), splits),
        lambda: algorithm.start(torch.ones(5, 2), splits, chunk=0, degree=2, reverse=True),
        lambda: algorithm.start(torch.ones(4, 2), splits, chunk=2, degree=2),
        lambda: algorithm.start(torch.ones(4), splits, codec=BF16),
    ]
    messages = []
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        messages.append(str(caught.value))
    if name == "2dh":
        with pytest.raises(InputError, match="2dh needs splits made by a 2dh"):
            algorithm.start(torch.ones(4, 2), Splits(splits.sent, splits.received))
    return messages


@pytest.mark.parametrize("name", ["linear", "2dh"])
def test_misfits_are_refused(name):
    (messages, *_) = run_ranks(report_refusals, 4, name)
    assert messages == [
        "counts_PC has 3 destinations; the group has 4 ranks",
        "counts_PC: torch.float32 of shape (4, 2); int64 with 2 dimensions expected",
        "header_H: torch.int64 of shape (1, 1); int64 with 1 dimensions expected",
        "5 rows given to be sent forward; chunk 0 of 1 has 4",
        "5 rows given to be sent back; chunk 0 of 2 has 0",
        "chunk=2 of degree=2; chunks are 0 to degree - 1",
        "codec 'bf16' is for rows (N, D); got (4,)",
    ]


def count_bytes():
    algorithm = Linear(make_world(2))
    group, matrix = algorithm.group, matrices(4, 3, 3)["sparse"]
    splits = algorithm.exchange_counts(matrix[group.rank])
    counts = group.traffic.snapshot()
    group.traffic.reset()
    rows = rows_to_send(matrix, group.rank)
    algorithm.start(rows, splits).wait()
    plain = group.traffic.snapshot()
    group.traffic.reset()
    algorithm.start(rows, splits, codec=FP8).wait()
    return counts, plain, group.traffic.snapshot()


def test_bytes_are_those_of_the_rows():
    matrix = matrices(4, 3, 3)["sparse"].sum(2)
    for rank, (counts, plain, encoded) in enumerate(run_ranks(count_bytes, 4)):
        mate, others = rank ^ 1, [p for p in range(4) if p // 2 != rank // 2]
        rows = {"inside": int(matrix[rank, mate]), "between": int(matrix[rank, others].sum())}
        messages = {"inside": rows["inside"] > 0, "between": int((matrix[rank, others] > 0).sum())}
        for traffic, row_bytes in ((plain, 2 * 4), (encoded, 2 + 4)):
            assert traffic == {
                "all_to_all": {
                    link: {"bytes": rows[link] * row_bytes, "messages": messages[link]} for link in rows
                }
            }
        assert counts["all_to_all"] == {
            "inside": {"bytes": 3 * 8, "messages": 1},
            "between": {"bytes": 2 * 3 * 8, "messages": 2},
        }


def lose_a_rank():
    algorithm = Linear(make_world())
    splits = algorithm.known(torch.ones(3, 3, 1, dtype=torch.int64))
    if algorithm.group.rank == 2:
        dist.destroy_process_group()  # as if it had ended
        return
    pending = algorithm.start(torch.ones(3, 2), splits)
    for _ in range(2):
        with pytest.raises(DistributedError, match="all_to_all on group 'world'"):
            pending.wait()


def test_a_lost_rank_is_an_error_however_often_it_is_waited_for():
    run_ranks(lose_a_rank, 3)


def test_a_group_of_one_exchanges_with_itself():
    algorithm = Linear(Group("alone", [0], None, [0]))
    assert not dist.is_initialized()
    splits = algorithm.exchange_counts(torch.tensor([[2, 0, 1]]))
    x = torch.randn(3, 2, requires_grad=True)
    y = all_to_all(x, algorithm, splits)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 2))
