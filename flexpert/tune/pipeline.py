"""How long dispatch, experts and combine take in chunks, of which some travel while others are computed."""

from __future__ import annotations


def pipeline(dispatch: float, experts: float, combine: float, degree: int, overlap: float = 1.0) -> float:
    """Seconds of the three together (Tutel, arXiv 2206.03382, section 3.2).

    All chunks are sent at once and arrive one after the other; a chunk is computed when it is there and the
    one before is done, and sent back when it is computed and the link is free.

    Args:
        dispatch: seconds of the exchange, all chunks together.
        experts: of computing, all chunks together.
        combine: of the exchange back.
        degree: chunks.
        overlap: the share of what so hides that really does, 0 to 1.

    Returns:
        between the longest of communication and computation, and their sum.
    """
    serial = dispatch + experts + combine
    if degree == 1:
        return serial
    done, link = 0.0, dispatch  # when the last chunk is computed; when the link is free for the way back
    for i in range(degree):
        done = max(done, dispatch * (i + 1) / degree) + experts / degree
        link = max(link, done) + combine / degree
    return overlap * link + (1 - overlap) * serial
