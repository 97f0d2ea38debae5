"""Groups, nodes and rows for the tests of transports, and where each row must arrive, in plain loops."""

from __future__ import annotations

import torch
from torch import distributed as dist

from flexpert.parallel.all_to_all import Linear
from flexpert.parallel.group import Group
from flexpert.parallel.hierarchical import Hierarchical


def make_group(name, ranks, places=1, traffic=None):
    """A group of some ranks, `places` of them on each node; None on other ranks. All ranks must call it."""
    process_group = dist.new_group(list(ranks))
    if dist.get_rank() not in ranks:
        return None
    nodes = [rank // places for rank in ranks]
    return Group(name, ranks, process_group, nodes, traffic)


def make_world(places=1):
    return make_group("world", range(dist.get_world_size()), places)


def make_grid(places):
    """The groups of a 2DH: all ranks, those of this node, those at this place of each node."""
    size, rank = dist.get_world_size(), dist.get_rank()
    world = make_world(places)
    inside = [
        make_group("inside", range(n, n + places), places, world.traffic) for n in range(0, size, places)
    ]
    between = [make_group("between", range(p, size, places), places, world.traffic) for p in range(places)]
    return world, inside[rank // places], between[rank % places]


def make_algorithm(name, places=2):
    return Linear(make_world(places)) if name == "linear" else Hierarchical(*make_grid(places))


def matrices(size, classes, seed):
    """Rows by (source, destination, class): even, random, sparse, all to one rank, one row, none."""
    generator = torch.Generator().manual_seed(seed)
    shape = size, size, classes
    dense = torch.randint(0, 9, shape, generator=generator)
    to_one = torch.zeros(shape, dtype=torch.int64)
    to_one[:, -1, 0] = 5
    one_row = torch.zeros(shape, dtype=torch.int64)
    one_row[0, -1, -1] = 1
    return {
        "even": torch.full(shape, 4),
        "random": dense,
        "sparse": dense * (torch.rand(shape, generator=generator) < 0.3),
        "to one rank": to_one,
        "one row": one_row,
        "none": torch.zeros(shape, dtype=torch.int64),
    }


def segment(matrix, source, destination, kind, chunk=0, degree=1):
    """Rows (n, 2) of one segment and chunk: numbers that occur once in the exchange, exact in every dtype."""
    count = int(matrix[source, destination, kind])
    start, stop = count * chunk // degree, count * (chunk + 1) // degree
    place = (source * matrix.shape[1] + destination) * matrix.shape[2] + kind
    return torch.tensor([[place, row] for row in range(start, stop)], dtype=torch.float32).view(-1, 2)


def rows_to_send(matrix, rank, chunk=0, degree=1):
    size, classes = matrix.shape[1:]
    return torch.cat(
        [segment(matrix, rank, d, c, chunk, degree) for d in range(size) for c in range(classes)]
    )


def rows_to_arrive(matrix, rank, chunk=0, degree=1):
    size, classes = matrix.shape[1:]
    return torch.cat(
        [segment(matrix, s, rank, c, chunk, degree) for s in range(size) for c in range(classes)]
    )
