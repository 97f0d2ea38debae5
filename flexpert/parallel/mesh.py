"""The mesh of the experts: the ranks as replica x expert x slice, and the groups that plans need.

Letters: W ranks of the mesh, E experts, S slices of one expert, X ranks along the expert axis (W = replicas X
S), B ranks of a block of slices.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.core.plan import ExecutionPlan

from .agree import agree, default_store, default_timeout, versions
from .all_to_all import Linear
from .bounded import bounded
from .group import Group
from .heartbeat import Heartbeat, heartbeat_for, heartbeat_of
from .hierarchical import Hierarchical
from .launch import warn_of_stale_store
from .pending import failure
from .traffic import Traffic

AXES = ("replica", "expert", "slice")
Algorithm = Linear | Hierarchical


class ExpertMesh:
    """Ranks that share the experts of a model; build it with `expert_mesh`.

    Rank (i, x, s) holds slice s of the experts x E / X ... (x + 1) E / X - 1, as the ranks (j, x, s) of the
    other replicas do. All process groups are made here, once; plans choose among them.

    Attributes:
        device_mesh: the axes "replica", "expert", "slice", for DTensors.
        num_experts, replicas, expert_ranks, slices: E, replicas, X and S.
        replica, expert, slice: the coordinates of this rank.
        whole: the X S ranks of this replica: tokens are exchanged among them.
        column: the X ranks with the same slice.
        blocks: B -> the B neighbouring slices around this rank, for every divisor B of S.
        same_slice, same_expert: the ranks with equal copies of a parameter that is cut into slices, and of
            one that is whole on each slice.
        everyone: all W ranks; the batch is spread over them.
        traffic: bytes that this rank sent.
        timeout: of a collective.
        heartbeat: knows which ranks are lost, or has given up; None where it is off.
        why_not_2dh: None, or why the hierarchical all-to-all cannot run here.
    """

    def __init__(
        self,
        num_experts: int,
        ranks: Sequence[int],
        shape: tuple[int, int, int],
        ranks_per_node: int,
        device: str,
        timeout: timedelta,
        heartbeat: Heartbeat | None,
    ) -> None:
        self.num_experts = num_experts
        self.replicas, self.expert_ranks, self.slices = shape
        self.ranks, self.ranks_per_node, self.timeout = tuple(ranks), ranks_per_node, timeout
        self.traffic = Traffic()
        self.heartbeat = heartbeat
        self._made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        grid = torch.tensor(ranks).view(shape)
        self.replica, self.expert, self.slice = (grid == dist.get_rank()).nonzero()[0].tolist()
        i, x, s = self.replica, self.expert, self.slice
        self.everyone = self._group("all ranks", grid.flatten())
        self.whole = self._group("expert parallel", grid[i].flatten())
        self.column = self._group("experts of one slice", grid[i, :, s])
        self.blocks = {
            size: self._group(f"blocks of {size} slices", grid[i, x, s // size * size :][:size])
            for size in range(1, self.slices + 1)
            if self.slices % size == 0
        }
        self.same_slice = self._group("replicas of a slice", grid[:, x, s])
        self.same_expert = self._group("replicas of an expert", grid[:, x].flatten())
        axes = self.same_slice, self.column, self.blocks[self.slices]
        some_is_alone = any(group.process_group is None for group in axes)
        alone = new_group((dist.get_rank(),), timeout) if some_is_alone else None
        self.device_mesh = DeviceMesh.from_group(
            [cast(dist.ProcessGroup, group.process_group or alone) for group in axes],
            device,
            mesh=grid,
            mesh_dim_names=AXES,
        )
        self.algorithms: dict[str, Algorithm] = {"linear": Linear(self.whole)}
        self.why_not_2dh = self._build_2dh()

    @cached_property
    def legal_r(self) -> tuple[int, ...]:
        """The values of r that a plan may have: 0 and the divisors of S."""
        return (0, *sorted(self.blocks))

    def check(self, plan: ExecutionPlan) -> None:
        """Refuse a plan that this mesh cannot run.

        Raises:
            ConfigError: r is no divisor of the slices, or the hierarchical all-to-all does not fit the nodes.
        """
        if plan.r not in self.legal_r:
            raise ConfigError(
                f"plan: r={plan.r} on a mesh with {self.slices} slices per expert; "
                f"legal values are {', '.join(map(str, self.legal_r))}"
            )
        if plan.algorithm == "2dh" and self.why_not_2dh:
            raise ConfigError(f"plan: algorithm='2dh' cannot run here: {self.why_not_2dh}; use 'linear'")

    def experts_of(self, num_experts: int) -> range:
        """The experts that this rank holds of a bank of `num_experts`."""
        each = num_experts // self.expert_ranks
        return range(self.expert * each, (self.expert + 1) * each)

    def extra_group(self, name: str) -> Group:
        """A new group of all ranks of the mesh, whose collectives never meet those of training; all call it.

        It runs on the host ("gloo"), and what it sends is not counted in `traffic`.

        Raises:
            DistributedError: a rank does not come.
        """
        members = self.everyone.ranks
        process_group = new_group(members, self.timeout, "gloo", name) if len(members) > 1 else None
        return Group(name, members, process_group, self.everyone.node_of, heartbeat=self.heartbeat)

    def __repr__(self) -> str:
        return (
            f"ExpertMesh(experts={self.num_experts}, replica={self.replicas}, expert={self.expert_ranks}, "
            f"slice={self.slices}, ranks_per_node={self.ranks_per_node})"
        )

    def _group(self, name: str, ranks: torch.Tensor) -> Group:
        """The group of these ranks; one that this process has made before serves again."""
        members = tuple(ranks.tolist())
        if members not in self._made:
            alone = len(members) == 1
            self._made[members] = None if alone else new_group(members, self.timeout, name=name)
        nodes = tuple(rank // self.ranks_per_node for rank in members)
        return Group(name, members, self._made[members], nodes, self.traffic, self.heartbeat)

    def _build_2dh(self) -> str | None:
        """Add the hierarchical all-to-all; the reason where it does not fit."""
        nodes = self.whole.node_of
        sizes = [nodes.count(node) for node in dict.fromkeys(nodes)]
        if nodes != tuple(sorted(nodes)) or len(set(sizes)) > 1:
            return (
                f"the {self.whole.size} ranks that exchange tokens lie on nodes {list(nodes)}, not equally "
                f"many on each (ranks_per_node={self.ranks_per_node})"
            )
        local = sizes[0]
        grid = torch.tensor(self.whole.ranks).view(-1, local)
        node, place = divmod(self.whole.rank, local)
        inside = self._group("one node", grid[node])
        between = self._group("one place of every node", grid[:, place])
        self.algorithms["2dh"] = Hierarchical(self.whole, inside, between)
        return None


def expert_mesh(
    num_experts: int,
    *,
    replicas: int = 1,
    slices: int | None = None,
    ranks: Sequence[int] | None = None,
    ranks_per_node: int | None = None,
    device: str | None = None,
    timeout: float | None = None,
    heartbeat: float | None = None,
) -> ExpertMesh:
    """Lay the experts out over ranks; every one of these ranks calls this with the same arguments.

    The ranks factor into replica x expert x slice, the slice varying fastest, so that the slices of an expert
    and then the experts of a replica are neighbours: with `replicas` = number of nodes, tokens stay inside a
    node. With P = ranks / replicas ranks for one copy of the experts: P <= E: each holds E / P whole experts;
    P > E: P / E ranks share one expert, each holding a slice of its hidden dimension.

    Args:
        num_experts: E, of the largest layer's bank of experts.
        replicas: copies of all experts; divides the ranks.
        slices: S in place of the default: cut experts into S slices although there are enough of them.
        ranks: global ranks of the mesh, in order; None for all. Disjoint meshes may exist beside each other;
            one over all ranks is made before meshes over unlike parts.
        ranks_per_node: neighbours that share a node; None reads LOCAL_WORLD_SIZE, else all are on one.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        timeout: seconds after which a collective gives up; None for that of the default process group.
        heartbeat: seconds between signs of life, which tell the lost ranks when a collective fails; 0 for
            none. None: 2 s where the process group was started over TCP, as by torchrun, else none.

    Raises:
        DistributedError: no process group is initialised, this rank is not one of `ranks`, a rank calls this
            with other arguments or under other versions, or does not call it in time.
        ConfigError: numbers that do not divide each other; the message lists the legal ones.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise DistributedError(
            "expert_mesh needs a process group: start with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
    _check_ranks(members)
    local = os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())
    per_node = int(local) if ranks_per_node is None else ranks_per_node
    if per_node < 1:
        raise ConfigError(f"ranks_per_node={ranks_per_node!r}: expected an integer >= 1")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    limit = default_timeout(device) if timeout is None else timedelta(seconds=timeout)
    if limit <= timedelta(0):
        raise ConfigError(f"timeout={timeout!r}: expected seconds > 0")
    facts = {
        "num_experts": num_experts,
        "replicas": replicas,
        "slices": slices,
        "ranks_per_node": per_node,
        "device": device,
        "timeout": limit.total_seconds(),
        "heartbeat": heartbeat,
        # PyTorch names a group after the number of those before it: unlike numbers would never meet.
        "process groups made before": len(dist.distributed_c10d._world.pg_names),
        **versions(),
    }
    warn_of_stale_store()
    name = agree("expert_mesh", facts, members, limit)
    shape = mesh_shape(num_experts, len(members), replicas, slices)
    beat = heartbeat_for(default_store(), members, heartbeat, name)
    mesh = ExpertMesh(num_experts, members, shape, per_node, device, limit, beat)
    if beat is not None:
        weakref.finalize(mesh, beat.stop).atexit = False
    return mesh


def new_group(
    members: Sequence[int], timeout: timedelta, backend: str | None = None, name: str | None = None
) -> dist.ProcessGroup:
    """A new process group, in bounded time; the name is for messages.

    Raises:
        DistributedError: a rank does not come.
    """

    # Only the members take part: meshes over parts of the world need not know of each other.
    def make() -> object:
        return dist.new_group(
            list(members),
            timeout=timeout,
            backend=backend,
            use_local_synchronization=True,
            group_desc=name,
        )

    try:
        group = bounded(make, timeout)
    except (RuntimeError, TimeoutError) as error:
        what = f"making a group of ranks {tuple(members)} failed"
        raise failure(what, error, heartbeat_of(members)) from error
    assert isinstance(group, dist.ProcessGroup), "this rank is a member"
    return group


def _check_ranks(members: list[int]) -> None:
    world = dist.get_world_size()
    if len(set(members)) != len(members) or not all(0 <= rank < world for rank in members):
        raise ConfigError(f"ranks={members}: expected different ranks in 0..{world - 1}")
    if dist.get_rank() not in members:
        raise DistributedError(f"rank {dist.get_rank()} is not part of the mesh of ranks {members}")


def mesh_shape(
    num_experts: int, world: int, replicas: int = 1, slices: int | None = None
) -> tuple[int, int, int]:
    """(replicas, expert ranks, slices) that `expert_mesh` makes of so many ranks.

    Raises:
        ConfigError: numbers that do not divide each other; the message lists the legal ones.
    """
    for name, value in (("num_experts", num_experts), ("replicas", replicas), ("slices", slices or 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r}: expected an integer >= 1")
    if world % replicas:
        raise ConfigError(
            f"replicas={replicas} does not divide {world} ranks; legal values are {_divisors(world)}"
        )
    share = world // replicas
    if slices is None:
        if num_experts % share and share % num_experts:
            legal = [
                n for n in range(1, 2 * max(num_experts, share)) if not (num_experts % n and n % num_experts)
            ]
            raise ConfigError(
                f"{num_experts} experts on {share} ranks: one number must divide the other; with "
                f"{num_experts} experts legal are {legal} ranks per replica (change the experts, the ranks "
                f"or replicas)"
            )
        slices = max(1, share // num_experts)
    if share % slices or num_experts % (share // slices):
        legal = [n for n in _divisors(share) if num_experts % (share // n) == 0]
        raise ConfigError(
            f"slices={slices} does not fit {num_experts} experts on {share} ranks; legal values are {legal}"
        )
    return replicas, share // slices, slices


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
