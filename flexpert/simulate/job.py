"""How a model is trained over the ranks of a cluster: meshes, micro-batch, recomputation, execution plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flexpert.core.config import require_bool, require_int
from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.parallel.mesh import mesh_shape
from flexpert.tune import LayerShape

from .cluster import Cluster
from .describe import split_text
from .model import ExpertPart, Model

_BIAS = {False: "none", True: "both", "b1": "b1", "b2": "b2"}


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """The parallel plan of a training job.

    Attributes:
        replicas, slices: of the experts' mesh, as of `flexpert.parallel.expert_mesh`.
        dense_shards: ranks over which the dense parameters are cut: 1 is DDP, all ranks FSDP, and a number
            between them cuts inside groups of neighbours and copies over the groups.
        micro_batch: samples of one rank in one pass; None: all that a rank has, in one pass.
        checkpointing: blocks keep their input alone and are computed anew in backward.
        execution: of the MoE layers.
    """

    replicas: int = 1
    slices: int | None = None
    dense_shards: int = 1
    micro_batch: int | None = None
    checkpointing: bool = False
    execution: ExecutionPlan = field(default_factory=ExecutionPlan)

    def __post_init__(self) -> None:
        for name in ("replicas", "dense_shards"):
            require_int(f"plan: {name}", getattr(self, name), least=1)
        for name in ("slices", "micro_batch"):
            if getattr(self, name) is not None:
                require_int(f"plan: {name}", getattr(self, name), least=1)
        require_bool("plan: checkpointing", self.checkpointing)

    @classmethod
    def parse(cls, text: str) -> JobPlan:
        """The plan of `r=1,degree=2,algorithm=2dh,replicas=2,dense_shards=8,checkpointing=true`.

        Raises:
            ConfigError: an unknown setting, or a bad value.
        """
        return cls.from_dict(split_text(f"plan:{text}", "plan")[1])

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> JobPlan:
        """A plan of plain data: its own fields and those of `ExecutionPlan` beside them.

        Raises:
            ConfigError: an unknown field, or a bad value.
        """
        own = {key: value for key, value in data.items() if key in _FIELDS}
        execution = ExecutionPlan.from_dict({k: v for k, v in data.items() if k not in _FIELDS})
        return cls(**own, execution=execution)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is its inverse."""
        data = asdict(self)
        return {**{key: data[key] for key in _FIELDS}, **self.execution.to_dict()}

    def describe(self) -> str:
        """The settings that differ from the defaults, in a line."""
        usual = JobPlan().to_dict()
        found = [f"{key}={value}" for key, value in self.to_dict().items() if value != usual[key]]
        return ",".join(found).replace("True", "true") or "r=1"


_FIELDS = ("replicas", "slices", "dense_shards", "micro_batch", "checkpointing")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How much of a batch a rank handles at once.

    Attributes:
        samples: of one rank in one pass.
        count: passes of a step.
    """

    samples: int
    count: int


def split_batch(batch: int, cluster: Cluster, plan: JobPlan) -> Pass:
    """A step's passes.

    Args:
        batch: samples of all ranks in a step.
        cluster: the ranks.
        plan: its micro-batch.

    Raises:
        ConfigError: numbers that do not divide each other.
    """
    require_int("batch", batch, least=1)
    if batch % cluster.ranks:
        least = cluster.ranks * max(1, round(batch / cluster.ranks))
        raise ConfigError(f"batch={batch} does not divide over {cluster.ranks} ranks; the nearest is {least}")
    each = batch // cluster.ranks
    samples = each if plan.micro_batch is None else plan.micro_batch
    if each % samples:
        raise ConfigError(f"plan: micro_batch={samples} does not divide the {each} samples of a rank")
    return Pass(samples=samples, count=each // samples)


def layer_shape(model: Model, part: ExpertPart, cluster: Cluster, plan: JobPlan) -> LayerShape:
    """A layer of the model on the cluster's ranks.

    Raises:
        ConfigError: experts and ranks that do not divide each other, or a plan that the layer cannot run.
    """
    replicas, expert_ranks, slices = mesh_shape(model.num_experts, cluster.ranks, plan.replicas, plan.slices)
    shape = LayerShape(
        model_dim=part.model_dim,
        hidden_dim=part.hidden_dim,
        output_dim=part.model_dim,
        num_experts=part.num_experts,
        gated=part.gated,
        bias=_BIAS[part.bias],
        dtype=model.dtype,
        parameter_dtype=model.parameter_dtype,
        expert_ranks=expert_ranks,
        slices=slices,
        replicas=replicas,
        ranks_per_node=cluster.devices,
        verify=False,
    )
    check_execution(shape, plan.execution)
    return shape


def check_execution(shape: LayerShape, plan: ExecutionPlan) -> None:
    """Refuse a plan that a layer's ranks cannot run; see `flexpert.tune.cost.check`."""
    from flexpert.tune.cost import check

    check(shape, plan)


def with_execution(plan: JobPlan, **changes: Any) -> JobPlan:
    """The same plan with other values of its `ExecutionPlan`."""
    return replace(plan, execution=replace(plan.execution, **changes))


def check_dense(cluster: Cluster, plan: JobPlan) -> None:
    """Refuse dense shards that do not divide the ranks.

    Raises:
        ConfigError: the message lists the legal numbers.
    """
    if cluster.ranks % plan.dense_shards:
        legal = [n for n in range(1, cluster.ranks + 1) if cluster.ranks % n == 0]
        raise ConfigError(
            f"plan: dense_shards={plan.dense_shards} does not divide {cluster.ranks} ranks; "
            f"legal values are {legal}"
        )
