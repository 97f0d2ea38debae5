"""The ranks of a run: this process alone, or those that were started together.

The convention: a rank's loss is such that its mean over ranks is the loss of the whole batch, and gradients
are averaged over ranks, as `DistributedDataParallel` and `flexpert.parallel` do. Figures of a step follow the
same rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flexpert.core.errors import DistributedError
from flexpert.parallel import fault_guard
from flexpert.parallel.agree import agree, default_timeout, versions

from .config import TrainConfig
from .many_ranks import ManyRanks
from .one_rank import OneRank
from .world import World, process_group, read_world

__all__ = ["ManyRanks", "OneRank", "join", "weighted"]

_GROUPS = ("data", "optimizer", "parallel")  # of settings
_OWN = ("output", "ranks", "threads", "device", "data.folder")  # settings of each rank's own


@contextmanager
def join(config: TrainConfig) -> Iterator[OneRank]:
    """The ranks of a run that is started now: those of torchrun, else this process alone.

    What fails on a rank inside the `with` ends it on all, see `fault_guard`.

    Raises:
        DistributedError: an environment that cannot be, ranks that do not meet, or have other settings, or a
            rank that is lost.
    """
    world = read_world()
    if config.ranks not in (None, world.size):
        raise DistributedError(
            f"ranks={config.ranks}, but this run has {world.size} (WORLD_SIZE): leave ranks out under "
            f"torchrun, or use `flexpert train CONFIG ranks={config.ranks}`, which starts as many processes"
        )
    device = world.device(config.device)
    if world.size == 1:
        yield OneRank(world, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(world, device, backend=config.backend, timeout=config.timeout):
        _agree_on(config, world, device)
        dtype = getattr(torch, config.optimizer.dtype)
        ranks = ManyRanks(world, device, config.parallel, dtype)
        try:
            with fault_guard(ranks.group):
                yield ranks
        finally:
            ranks.close()


def _agree_on(config: TrainConfig, world: World, device: torch.device) -> None:
    """Refuse ranks with unlike settings: they would train unlike models, or wait for each other for ever."""
    facts: dict[str, object] = dict(versions())
    for name, value in config.to_dict().items():
        group = value if name in _GROUPS else {"": value}
        facts |= {f"{name}.{key}".rstrip("."): inner for key, inner in group.items()}
    facts = {name: value for name, value in facts.items() if name not in _OWN}
    agree("the training job", facts, range(world.size), default_timeout(device.type))


def weighted(value: Tensor, weight: float) -> Tensor:
    """The value times its weight; the value itself, bit for bit, where that is 1.

    A mean over local samples, weighted by local * W / all, is a term whose mean over W ranks is the mean over
    all samples.
    """
    return value if weight == 1 else value * weight
