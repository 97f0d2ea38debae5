"""The place of this process among those of a run, as torchrun tells it in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.core.registry import suggest
from flexpert.parallel.launch import init_process_group

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_REMEDY = "start the run with torchrun, which sets them all, or unset them all for one process"


@dataclass(frozen=True)
class World:
    """One of several processes; by default the only one.

    Attributes:
        rank: of this process, 0..size - 1.
        size: processes of the run, W.
        local_rank: of this process on its machine, 0..local_size - 1.
        local_size: processes on its machine.

    Raises:
        DistributedError: numbers that cannot be.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __post_init__(self) -> None:
        for name, rank, size in (
            ("RANK", self.rank, self.size),
            ("LOCAL_RANK", self.local_rank, self.local_size),
        ):
            if not 0 <= rank < size:
                other = "WORLD_SIZE" if name == "RANK" else "LOCAL_WORLD_SIZE"
                raise DistributedError(f"{name}={rank}, {other}={size}: expected 0 <= {name} < {other}")
        if self.local_size > self.size:
            raise DistributedError(
                f"LOCAL_WORLD_SIZE={self.local_size} exceeds WORLD_SIZE={self.size}: "
                f"no machine has more processes than the run"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.rank == 0

    def device(self, name: str | None = None) -> torch.device:
        """Where this process computes.

        Args:
            name: "cpu" or "cuda"; None takes a GPU where there is one. On several ranks "cuda" is the GPU of
                the local rank.

        Raises:
            ConfigError: no such device, none on this machine, or a numbered GPU for several ranks.
            DistributedError: fewer GPUs than processes on this machine.
        """
        gpus = torch.cuda.device_count()
        try:
            device = torch.device(name or ("cuda" if gpus else "cpu"))
        except RuntimeError:
            device = torch.device("meta")  # refused like it
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device={name!r}: expected 'cpu', 'cuda' or None (a GPU if there is one)")
        if device.type == "cpu":
            return device
        if self.size == 1:
            if (device.index or 0) >= gpus:
                raise ConfigError(f"device={name!r}: PyTorch sees {gpus} GPUs here; give 'cpu', or None")
            return device
        if ":" in str(device):
            raise ConfigError(
                f"device={name!r} on {self.size} ranks: give 'cuda'; each rank takes its own GPU"
            )
        if self.local_size > gpus:
            raise DistributedError(
                f"{self.local_size} processes on a machine with {gpus} GPUs; "
                f"start fewer with torchrun --nproc-per-node, or give device='cpu'"
            )
        return torch.device("cuda", self.local_rank)


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """The world that the environment (that of this process by default) tells of; one process without.

    Raises:
        DistributedError: some of torchrun's variables without the others, or nonsense in them.
    """
    environment = os.environ if environment is None else environment
    given = {name: environment[name] for name in _VARIABLES if name in environment}
    if not given:
        return World()
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise DistributedError(
            f"{', '.join(given)} set in the environment, {', '.join(missing)} not: {_REMEDY}"
        )
    try:
        rank, size, local_rank, local_size = (int(text) for text in given.values())
    except ValueError:
        shown = ", ".join(f"{name}={text!r}" for name, text in given.items())
        raise DistributedError(f"{shown}: expected integers; {_REMEDY}") from None
    return World(rank, size, local_rank, local_size)


def cut(first: int, end: int, index: int, parts: int) -> tuple[int, int]:
    """Part `index` of first..end - 1 in `parts` contiguous parts; the first ones may have one more."""
    base, more = divmod(end - first, parts)
    start = first + index * base + min(index, more)
    return start, start + base + (index < more)


@contextmanager
def process_group(
    world: World, device: torch.device, *, backend: str | None = None, timeout: float = 600.0
) -> Iterator[None]:
    """The default process group of torch.distributed for the time of the `with`, after restarts too.

    A group that exists already is used, and stays.

    Args:
        world: of this process.
        device: where it computes.
        backend: of torch.distributed; None for "nccl" on GPUs and "gloo" elsewhere.
        timeout: seconds after which a collective that a rank does not join is an error.

    Raises:
        DistributedError: no group could be made, or one of another size exists.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
            raise DistributedError(
                f"the process group has rank {dist.get_rank()} of {dist.get_world_size()}, the environment "
                f"says RANK={world.rank}, WORLD_SIZE={world.size}; destroy the group before the run"
            )
        yield
        return
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    if ":" not in backend and backend not in dist.Backend.backend_list:
        raise DistributedError(f"backend={backend!r}: {suggest(backend, dist.Backend.backend_list)}")
    try:
        init_process_group(
            backend,
            timeout=timeout,
            rank=world.rank,
            world_size=world.size,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise DistributedError(
            f"rank {world.rank} of {world.size} could not join the others at {address} by {backend!r}: "
            f"{error}; start all ranks with torchrun, and let this one reach that address"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()
