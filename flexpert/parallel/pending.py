"""A collective under way."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor
from torch import distributed as dist

from flexpert.core.errors import DistributedError


class Pending:
    """A collective under way. It keeps its buffers alive until it is waited for."""

    def __init__(
        self,
        label: str,
        work: dist.Work | None = None,
        *,
        keep: tuple[Tensor, ...] = (),
        finish: Callable[[], object] | None = None,
        end: Callable[[], None] | None = None,
    ) -> None:
        self._label = label
        self._work = work
        self._keep = keep
        self._finish = finish
        self._end = end
        self._begin = time.monotonic()

    def wait(self) -> None:
        """Return when the result is there (on CUDA: for work queued on the current stream from now on).

        Raises:
            DistributedError: the collective failed: a rank is gone or too late, or called something else.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise self.error(error) from error
        if self._finish is not None:
            self._finish()
        if self._end is not None:
            self._end()
        self._work, self._keep, self._finish, self._end = None, (), None, None

    def error(self, cause: Exception) -> DistributedError:
        """What to raise for a failure: which collective, after how long, and why."""
        waited = time.monotonic() - self._begin
        return DistributedError(f"{self._label} failed after {waited:.1f} s: {cause}")
