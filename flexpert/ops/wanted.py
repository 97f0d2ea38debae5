"""The kernel that a caller wants for its experts, where that is not the first one that can run them."""

from __future__ import annotations

import threading


class _State(threading.local):
    kernel = "auto"


_state = _State()


def wanted_kernel() -> str:
    """One of `flexpert.core.plan.KERNELS`: what this thread wants now; "auto" outside of `wanting`."""
    return _state.kernel


class wanting:  # noqa: N801  (used like a function)
    """`with wanting("portable"):` experts are computed so where that is possible, else as usual.

    It holds for this thread and for calls inside the `with`; their backward pass, whenever it comes, keeps
    to the kernels of the forward pass. Forcing a backend in tests is `use_backend`'s, which wins.

    Args:
        kernel: one of `flexpert.core.plan.KERNELS`.
    """

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel

    def __enter__(self) -> None:
        self._before = _state.kernel
        _state.kernel = self._kernel

    def __exit__(self, *error: object) -> None:
        _state.kernel = self._before
