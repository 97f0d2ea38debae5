"""The environment of a rank: what torchrun sets, and what the emulation needs besides."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from .network import Network

# A fresh buffer of the size of a layer's rows would be mapped, page by page, at each step: a third of the
# time of a product on one thread. The allocator keeps them instead.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
# Of several; a user's own value is kept.
DEFAULTS = {
    "OMP_NUM_THREADS": "1",  # as torchrun sets it
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # there are no host names in a namespace: else a warning per rank
    **MALLOC,
}


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    rank: int
    node: int
    local_rank: int

    @property
    def prefix(self) -> str:
        """How its lines begin: the node, the rank on that node."""
        return f"[{self.node}.{self.local_rank}]"

    def __str__(self) -> str:
        return f"rank {self.rank} (node {self.node}, local rank {self.local_rank})"


def places(nodes: int, ranks: int) -> list[Place]:
    """All ranks of a cluster, node after node."""
    return [Place(rank, *divmod(rank, ranks)) for rank in range(nodes * ranks)]


def rank_environment(network: Network, place: Place, port: int) -> dict[str, str]:
    """The variables of one rank, over those of this process."""
    spec = network.spec
    own = {
        "RANK": place.rank,
        "WORLD_SIZE": spec.world_size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": spec.ranks,
        "GROUP_RANK": place.node,
        "GROUP_WORLD_SIZE": spec.nodes,
        "ROLE_RANK": place.rank,
        "ROLE_WORLD_SIZE": spec.world_size,
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": network.device,
        "FLEXPERT_EMULATE": f"{network.mode}, {spec.describe()}",  # a machine of its own to the tuner
    }
    return {**DEFAULTS, **os.environ, **{name: str(value) for name, value in own.items()}}


def set_allocator() -> None:
    """MALLOC for this process, which has begun already; as far as its C library knows how."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)
