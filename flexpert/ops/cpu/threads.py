"""How many threads a native call may use."""

from __future__ import annotations

import os

import torch

_is_child = False


def _after_fork() -> None:
    global _is_child  # noqa: PLW0603
    _is_child = True


# The threads of a parent do not live on in its child, whose own first parallel region would wait for them.
os.register_at_fork(after_in_child=_after_fork)


def num_threads() -> int:
    """PyTorch's number; 1 in a forked child."""
    return 1 if _is_child else torch.get_num_threads()
