"""Work that ends in time although what it asks may never answer, such as a store out of reach."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

Result = TypeVar("Result")
MARGIN = 2.0  # seconds beyond the limit, in which work that keeps it itself can say more


def bounded(work: Callable[[], Result], limit: timedelta) -> Result:
    """What `work` returns or raises, from a thread of its own that is left behind where it takes too long.

    Raises:
        TimeoutError: it took longer.
    """
    told: queue.SimpleQueue[tuple[list[Result], BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            told.put(([work()], None))
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            told.put(([], error))

    threading.Thread(target=run, name="flexpert bounded", daemon=True).start()
    try:
        results, error = told.get(timeout=limit.total_seconds() + MARGIN)
    except queue.Empty:
        raise TimeoutError(f"no answer within {limit.total_seconds():g} s") from None
    if error is not None:
        raise error
    return results[0]
