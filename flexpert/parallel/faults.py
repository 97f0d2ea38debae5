"""Faults of a step over many ranks, told by the layer's name, as one class of error, to all ranks at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from flexpert.core.errors import DistributedError

from .calls import call_of
from .group import Group
from .mesh import ExpertMesh
from .pending import failure

_WORDS = re.compile(
    r"gloo|nccl|closed by peer|reset by peer|process group|operation timed out", re.IGNORECASE
)


@contextmanager
def fault_guard(ranks: ExpertMesh | Group) -> Iterator[None]:
    """Around a step: what fails on one rank ends the step on all, and always as a `DistributedError` there.

        with fault_guard(mesh):
            loss = model(batch).mean()
            loss.backward()
            optimizer.step()

    - An error of this rank alone (out of memory, a bad input) goes on unchanged, and the others are told:
      where they wait for this rank in a collective of Flexpert, they raise soon, not after the timeout.
    - An error of a collective that Flexpert does not call itself (DDP, FSDP, DTensor), a RuntimeError of the
      backend, is raised as a `DistributedError` that names operation, group and the lost ranks.

    Telling needs a heartbeat, see `expert_mesh`. A rank that told an error is out of the run: start it again.

    Args:
        ranks: that take the step together: the mesh of the experts, or a group.

    Raises:
        DistributedError: a collective failed.
    """
    try:
        yield
    except DistributedError:
        raise
    except Exception as error:
        if is_of_collective(error):
            unknown = f"a collective that PyTorch calls itself (DDP, FSDP, DTensor) on ranks {ranks.ranks}"
            what = f"{call_of(error) or unknown} failed"
            raise failure(what, error, ranks.heartbeat) from error
        if ranks.heartbeat is not None:
            ranks.heartbeat.abort(f"{type(error).__name__}: {error}")
        raise


def is_of_collective(error: Exception) -> bool:
    """Whether an error comes from torch.distributed; gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    plain = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    return plain and _WORDS.search(str(error)) is not None
