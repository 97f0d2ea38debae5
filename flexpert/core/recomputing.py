"""Whether a forward is a recomputation."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether this forward runs inside a backward, as activation checkpointing makes it; False in a graph."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
