"""How long dispatch, experts and combine take in chunks, of which some travel while others are computed."""

from __future__ import annotations

from .machine import Machine


def pipeline(dispatch: float, experts: float, combine: float, degree: int, machine: Machine) -> float:
    """Seconds of the three together.

    All chunks are sent at once and arrive one after the other; a chunk is computed when it is there and the
    one before is done, and sent back when it is computed and the link is free.

    Args:
        dispatch: seconds of the exchange, all chunks together.
        experts: of computing, all chunks together.
        combine: of the exchange back.
        degree: chunks.
        machine: whose interference and concurrency count where chunks overlap.

    Returns:
        between the longest of communication and computation, and their sum.
    """
    if degree == 1:
        return dispatch + experts + combine
    fills = max(machine.between.concurrency, 1.0)
    there, back = dispatch / degree / fills, combine / degree / fills
    chunk = experts / degree
    done = ended = 0.0
    link = dispatch / fills  # busy with what goes there
    for i in range(degree):
        arrived = (i + 1) * there
        done = max(done, arrived) + chunk * (machine.interference if arrived < dispatch / fills else 1.0)
        link = max(link, done) + back
        ended = link
    return min(ended, dispatch + experts + combine)
