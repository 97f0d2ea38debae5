"""A run of several processes: the one place of the training job that knows of collectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from flexpert.core.errors import DistributedError
from flexpert.core.plan import ExecutionPlan
from flexpert.core.seeding import derive_seed
from flexpert.core.stats import reduce_stats
from flexpert.layer import MoE
from flexpert.parallel import (
    ExpertMesh,
    clip_grad_norm_,
    expert_mesh,
    full_state_dict,
    groups_by_mesh,
    no_sync,
    parallelize,
    time_phases,
)
from flexpert.parallel.agree import agree, default_store, default_timeout, versions
from flexpert.parallel.dense import name_ddp, name_fsdp
from flexpert.parallel.differentiable import all_reduce
from flexpert.parallel.group import Group
from flexpert.parallel.heartbeat import Heartbeat, heartbeat_for
from flexpert.parallel.state import accept_full_tensors
from flexpert.parallel.together import Ranks

from .config import ParallelConfig
from .one_rank import OneRank
from .stragglers import Stragglers
from .task import StepResult
from .tuning import make_tuning
from .world import World


class ManyRanks(OneRank):
    """Ranks that share a model: each has its part of the experts, and dense layers are replicated or sharded.

    Args:
        world: the place of this process in the default process group.
        device: where it computes.
        layout: how the model is shared.
        dtype: that experts compute in.

    Attributes:
        mesh: of the experts, after `prepare`; None for a model without.
        group: all ranks; after `prepare` it knows which of them are lost.
    """

    def __init__(
        self,
        world: World,
        device: torch.device | None = None,
        layout: ParallelConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(world, device)
        self._dtype = dtype
        self.layout = ParallelConfig() if layout is None else layout
        self.mesh: ExpertMesh | None = None
        self._dense_heartbeat: Heartbeat | None = None
        self._by_plan: dict[str, list[float]] = {}  # steps, seconds, bytes inside and between nodes
        everyone = dist.group.WORLD
        if everyone is None:
            raise DistributedError("no process group is initialised; `join` makes one")
        nodes = [rank // world.local_size for rank in range(world.size)]
        self.group = Group("all ranks", range(world.size), everyone, nodes)
        self.all_reduce = lambda values: all_reduce(values, self.group)

    def prepare(self, model: nn.Module) -> None:
        """Lay the experts out over a mesh of the ranks and make the rest data parallel, in place.

        Raises:
            ConfigError: a layout or plan that does not fit model or ranks.
            DistributedError: the ranks' models differ.
        """
        layout, experts = self.layout, _most_experts(model)
        if not experts:
            return self._prepare_dense(model)
        self.mesh = expert_mesh(
            experts,
            replicas=layout.replicas,
            slices=layout.slices,
            ranks_per_node=self.world.local_size,
            device=self.device.type,
        )
        self.group.heartbeat = self.mesh.heartbeat
        auto = isinstance(layout.plan, str)
        parallelize(model, self.mesh, dense=layout.dense, plan=_static(layout), verify=layout.verify)
        if auto:
            self.tuning = make_tuning(model, self.mesh, self._dtype, layout.deterministic)
        self.mesh.traffic.reset()
        return None

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups, each cut into those of tensors of one mesh."""
        return groups_by_mesh(groups)

    def seed(self, base: int, step: int) -> None:
        """Set the random state from (seed, step, rank): ranks differ, and a resumed run needs no state."""
        torch.manual_seed(derive_seed(base, "step", step, "rank", self.world.rank))

    def micro_batch(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; only that of the last one averages gradients."""
        return nullcontext() if last else no_sync(model)

    def clip_grad_norm(self, model: nn.Module, limit: float) -> Tensor:
        """As one process would; see `flexpert.parallel.clip_grad_norm_`."""
        return clip_grad_norm_(model, limit)

    def whole(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors of the model as one process has them, on rank 0; nothing elsewhere."""
        return full_state_dict(model)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around a step, inside that of the tuner: what it takes is noted for the plans that it runs."""
        tuner = self.tuning.tuner
        if tuner is None or self.mesh is None:
            yield
            return
        sent, begin = self.mesh.traffic, time.perf_counter()
        inside, between = sent.inside, sent.between
        yield
        taken = 1, time.perf_counter() - begin, sent.inside - inside, sent.between - between
        before = self._by_plan.get(tuner.describe_plans(), [0.0] * 4)
        self._by_plan[tuner.describe_plans()] = [x + y for x, y in zip(before, taken, strict=True)]

    def traffic(self, steps: int) -> dict[str, Any]:
        """The plan, and the bytes of a step that all ranks sent to others of their node and of other nodes.

        Counted are rows, parameters and gradients of the experts, not the averages of dense layers. Where
        the tuner chooses, "plans" has the plans of these steps: how many had each, and the mean of one's
        seconds and bytes.
        """
        if self.mesh is None:
            return {}
        own = torch.tensor([self.mesh.traffic.inside, self.mesh.traffic.between], device=self.device)
        self.mesh.traffic.reset()
        inside, between = (round(sent / steps) for sent in self.total(own).tolist())
        text = " ".join(f"{name}={value}" for name, value in _static(self.layout).to_dict().items())
        found: dict[str, Any] = {"plan": text, "bytes_inside": inside, "bytes_between": between}
        if self.tuning.tuner is not None:
            found |= {"plan": self.tuning.tuner.describe_plans(), "plans": self._plans()}
        return found

    def _plans(self) -> dict[str, dict[str, float]]:
        """What `counted` has noted since the last call."""
        noted, self._by_plan = self._by_plan, {}
        own = torch.tensor([taken[1:] for taken in noted.values()], dtype=torch.float64, device=self.device)
        return {
            text: {
                "steps": int(steps),
                "seconds": seconds / self.world.size / steps,
                "bytes_inside": round(inside / steps),
                "bytes_between": round(between / steps),
            }
            for (text, (steps, *_)), (seconds, inside, between) in zip(
                noted.items(), self.total(own).tolist(), strict=True
            )
        }

    @contextmanager
    def timed(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Stragglers]:
        """Around training: what tells slow ranks, on CPU with experts.

        A GPU computes behind the host's clock; without experts ranks wait only inside of DDP or FSDP, where
        the wait cannot be told from work.
        """
        if self.mesh is None or self.device.type == "cuda":
            yield Stragglers()
            return
        with time_phases(model, optimizer) as timers:
            yield Stragglers(timers, self.mesh)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        total = values.detach().clone()
        self.group.all_reduce(total)
        return total

    def figures(self, result: StepResult) -> StepResult:
        """Means over ranks of loss and metrics, and the statistics of the whole batch."""
        values = torch.stack([result.loss.detach(), *(value.float() for value in result.metrics.values())])
        loss, *metrics = self.total(values) / self.world.size
        stats = reduce_stats(result.stats, self.total)
        return StepResult(loss, dict(zip(result.metrics, metrics, strict=True)), stats)

    def from_main(self, make: Callable[[], str]) -> str:
        """What `make` returns on rank 0, which alone calls it; what it raises there is raised everywhere."""
        return Ranks().first(make)

    def close(self) -> None:
        """Tell the other ranks that this one leaves; before the process group is destroyed."""
        if self._dense_heartbeat is not None:
            self._dense_heartbeat.stop()

    def _prepare_dense(self, model: nn.Module) -> None:
        members, limit = self.group.ranks, default_timeout(self.device.type)
        name = agree("dense job", versions(), members, limit)
        self._dense_heartbeat = heartbeat_for(default_store(), members, None, name)
        self.group.heartbeat = self._dense_heartbeat
        if self.layout.dense == "ddp":
            replicate(model)
            name_ddp(model, self.group)
            return
        assert self.group.process_group is not None
        mesh = DeviceMesh.from_group(self.group.process_group, self.device.type, mesh_dim_names=("rank",))
        fully_shard(model, mesh=mesh)
        name_fsdp(model)
        accept_full_tensors(model)


def _static(layout: ParallelConfig) -> ExecutionPlan:
    """The plan where none is chosen."""
    return ExecutionPlan() if isinstance(layout.plan, str) else ExecutionPlan.from_dict(layout.plan)


def _most_experts(model: nn.Module) -> int:
    """The experts that travel in the model's largest bank; 0 without any."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, MoE)]
    banks = [bank for layer in layers for bank in layer.experts.groups().values()]
    return max((bank.num_experts for bank in banks if bank.remote), default=0)
