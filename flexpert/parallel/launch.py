"""Joining the process group under torchrun, again and again: restarts that gloo survives."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from flexpert.core.errors import DistributedError

from .agree import default_store

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MARK = "flexpert/attempt"  # in the store of a process group that was made here


def init_process_group(
    backend: str | None = None,
    *,
    timeout: float = 600.0,
    rank: int | None = None,
    world_size: int | None = None,
    device_id: torch.device | None = None,
) -> None:
    """`torch.distributed.init_process_group` for ranks that torchrun starts, and restarts after a failure.

    torchrun shares one store with all incarnations of the ranks. PyTorch's gloo finds the addresses of the
    killed ones there and connects to nobody; here each incarnation has keys of its own. (Where the number of
    ranks changes between incarnations set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun as well.)

    Args:
        backend: "gloo" or "nccl"; None: nccl where there is a GPU.
        timeout: seconds after which a collective gives up, and meeting does.
        rank: of this process; None for the variable RANK.
        world_size: number of ranks; None for the variable WORLD_SIZE.
        device_id: the GPU of this rank, which binds NCCL to it at once; None: NCCL finds out.

    Raises:
        DistributedError: a variable that torchrun sets is missing, or the ranks do not meet.
    """
    given = {"RANK": rank, "WORLD_SIZE": world_size}
    missing = [name for name in _VARIABLES if name not in os.environ and given.get(name) is None]
    if missing:
        raise DistributedError(
            f"{', '.join(missing)} not set: start with torchrun, such as torchrun --nproc-per-node 2 train.py"
        )
    rank = int(os.environ["RANK"]) if rank is None else rank
    size = int(os.environ["WORLD_SIZE"]) if world_size is None else world_size
    limit = timedelta(seconds=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            size,
            is_master=rank == 0 and not shares_store(),
            timeout=limit,
            multi_tenant=True,
        )
        dist.init_process_group(
            backend or ("nccl" if torch.cuda.is_available() else "gloo"),
            store=PrefixStore(f"flexpert/attempt/{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=device_id,
        )
        default_store().set(_MARK, attempt)
    except RuntimeError as error:
        raise DistributedError(f"rank {rank} of {size} (attempt {attempt}) met nobody: {error}") from error


def shares_store() -> bool:
    """Whether torchrun's agent hosts the store, for all incarnations of the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def warn_of_stale_store() -> None:
    """Warn where torchrun would restart this job and gloo would not come up again.

    The agent reads the remedy at its own start, so that a rank can only tell of it.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    if not (restarts and shares_store() and dist.get_backend() == "gloo" and dist.get_rank() == 0):
        return
    if default_store().check([_MARK]):
        return
    warnings.warn(
        f"torchrun --max-restarts {restarts} on gloo: restarted ranks would look for the killed ones in the "
        f"store that torchrun shares with them, and meet nobody. Call flexpert.parallel.init_process_group "
        f"instead of PyTorch's, or start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --standalone",
        UserWarning,
        stacklevel=3,
    )
