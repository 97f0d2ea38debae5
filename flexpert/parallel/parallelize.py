"""From a model on every rank to a model over all ranks."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.core.layout import ParamLayout
from flexpert.core.plan import AnyPlan, ExecutionPlan

from .dense import name_ddp, name_fsdp
from .gradients import GradientSync
from .group import Group
from .layout import laid_out, shard_bank
from .mesh import ExpertMesh
from .meta import bases, fill_dense
from .state import accept_full_tensors
from .transport import ExpertParallel, prepare

DENSE = ("ddp", "fsdp")


def parallelize(
    model: nn.Module,
    mesh: ExpertMesh,
    *,
    dense: str | None = None,
    dense_mesh: DeviceMesh | None = None,
    mixed_precision: torch.dtype | None = None,
    plan: AnyPlan | None = None,
    verify: bool = True,
) -> nn.Module:
    """Lay every MoE layer of a model out over a mesh, and wrap the rest for data parallelism; in place.

    All ranks call it with the same model: built from the same seed, or loaded from the same checkpoint.
    Expert parameters and buffers become DTensors on the mesh; the optimiser is built after this. Router,
    shared experts and zero-computation experts stay dense.

    The model may have been built on the meta device: each rank then makes its own experts only, and all of
    the dense part, with values that do not depend on the number of ranks; see `flexpert.parallel.meta`.

    Args:
        model: holds layers `flexpert.MoE` at any depth, or is one.
        mesh: of the experts; see `expert_mesh`.
        dense: "ddp" replicates everything but the experts, "fsdp" shards it (FSDP2); None leaves it alone.
        dense_mesh: for the dense part, over the same ranks in any other factors; None: one axis of all.
        mixed_precision: dtype that "fsdp" computes in, parameters staying as they are (experts follow the
            dtype of their input); with "ddp" use autocast.
        plan: for calls that bring none; None is `ExecutionPlan()`, "auto" leaves it to a tuner
            (`flexpert.tune.attach`, after this).
        verify: compare what the ranks are about to do before rows travel; see `ExpertParallel`. Without it a
            padded plan needs equally many tokens on every rank where the router has a capacity: buffers must
            be of one size.

    Returns:
        The model.

    Raises:
        ConfigError: no MoE layer, a bank that the mesh does not divide, experts that share a parameter with
            others or with the rest, or a bad argument.
        DistributedError: the ranks' models differ.
    """
    if dense is not None and dense not in DENSE:
        raise ConfigError(f"dense={dense!r}: expected None or one of {', '.join(DENSE)}")
    if mixed_precision is not None and dense != "fsdp":
        raise ConfigError(f"mixed_precision={mixed_precision} needs dense='fsdp'; use torch.autocast instead")
    layers = _layers(model)
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no MoE layer to lay out; wrap it with DDP or FSDP itself"
        )
    for name, layer in layers.items():
        if isinstance(layer.transport, ExpertParallel):
            raise ConfigError(f"layer {name!r} is laid out already; parallelize a model once")
    default = ExecutionPlan() if plan is None else plan
    _check_not_shared(model, layers)
    transports = {name: prepare(name, layer.experts, mesh, default, verify) for name, layer in layers.items()}
    fill_dense(model, mesh.device_mesh.device_type, _laid_out(layers))
    _compare_models(model, mesh)
    sync = GradientSync()
    experts: set[nn.Parameter] = set()
    for name, layer in layers.items():
        for parameter, layout in shard_bank(layer.experts, mesh):
            sync.watch(parameter, _ranks_with_copies(layout, mesh))
            experts.add(parameter)
        layer.transport, layer.gradient_sync = transports[name], sync
    if dense == "ddp":
        _replicate(model, mesh, dense_mesh, experts)
    elif dense == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=mixed_precision)
        scalars = {p for p in model.parameters() if p.dim() == 0}  # FSDP refuses them; they stay whole
        for parameter in model.parameters():
            if parameter in scalars:
                sync.watch(parameter, mesh.everyone)
        fully_shard(model, mesh=dense_mesh or _flat(mesh), mp_policy=policy, ignored_params=experts | scalars)
        name_fsdp(model)
    accept_full_tensors(model)
    return model


def _layers(model: nn.Module) -> dict[str, Any]:
    """The MoE layers by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "transport") and hasattr(module, "experts")
    }


def _check_not_shared(model: nn.Module, layers: dict[str, Any]) -> None:
    """Refuse a parameter of experts that is one of something else too: the two would no longer be one."""
    groups = [g for layer in layers.values() for g in layer.experts.groups().values() if g.remote]
    paths = list(model.named_modules(remove_duplicate=False))
    banks = tuple(f"{path}." for path, module in paths if any(module is group for group in groups))
    inside: dict[torch.Tensor, str] = {}
    outside: dict[torch.Tensor, str] = {}
    for path, module in paths:
        found = inside if f"{path}.".startswith(banks) else outside
        found |= {p: f"{path}.{name}" for name, p in module._parameters.items() if p is not None}
    for parameter in inside.keys() & outside.keys():
        raise ConfigError(
            f"{inside[parameter]} is also {outside[parameter]}, outside of the experts, which are cut over "
            f"ranks; give one of them a copy"
        )


def _ranks_with_copies(layout: ParamLayout | None, mesh: ExpertMesh) -> Group:
    """The ranks that hold the same part of a parameter; without a layout, all."""
    if layout is None:
        return mesh.everyone
    return mesh.same_expert if layout.slice_dim is None else mesh.same_slice


def _laid_out(layers: dict[str, Any]) -> set[torch.Tensor]:
    """The parameters of which each rank has a part."""
    return {p for layer in layers.values() for p in laid_out(layer.experts).values()}


def _replicate(
    model: nn.Module, mesh: ExpertMesh, dense_mesh: DeviceMesh | None, experts: set[nn.Parameter]
) -> None:
    if dense_mesh is not None and dense_mesh.ndim != 1:
        raise ConfigError(f"dense='ddp' averages over one axis; dense_mesh has {dense_mesh.mesh_dim_names}")
    if not any(p.requires_grad and p not in experts for p in model.parameters()):
        return
    group = mesh.everyone.process_group if dense_mesh is None else dense_mesh.get_group()
    if group is None:
        return
    ignored = [
        module
        for module in model.modules()
        if any(p in experts for p in module.parameters(recurse=False))
        or any(isinstance(buffer, DTensor) for buffer in module.buffers(recurse=False))
    ]
    replicate(model, ignored_modules=ignored, process_group=group)
    members = dist.get_process_group_ranks(group)
    nodes = [rank // mesh.ranks_per_node for rank in members]
    name_ddp(model, Group("data parallel", members, group, nodes, heartbeat=mesh.heartbeat))


def _flat(mesh: ExpertMesh) -> DeviceMesh:
    """All ranks of the mesh on one axis."""
    device = mesh.device_mesh.device_type
    if mesh.everyone.process_group is None:
        return init_device_mesh(device, (1,), mesh_dim_names=("data",))
    return DeviceMesh.from_group(
        mesh.everyone.process_group, device, mesh=list(mesh.ranks), mesh_dim_names=("data",)
    )


def _compare_models(model: nn.Module, mesh: ExpertMesh) -> None:
    """Raise unless all ranks hold the same parameters and the same idea of the mesh."""
    facts = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    world = (mesh.num_experts, mesh.replicas, mesh.expert_ranks, mesh.slices, mesh.ranks_per_node)
    sums = torch.stack([_digest(p) for p in model.parameters()] or [torch.zeros(())]).sum()
    values = sums.numpy().tobytes() + repr(bases(model)).encode()
    own = torch.tensor([_hash(repr(facts)), _hash(repr(world)), _hash(values)])
    all_ = own.new_empty(mesh.everyone.size * 3)
    mesh.everyone.all_gather(all_, own).wait()
    for rank, theirs in zip(mesh.ranks, all_.view(-1, 3).tolist(), strict=True):
        for what, mine, other in zip(
            ("names, shapes or dtypes", "mesh", "values"), own.tolist(), theirs, strict=True
        ):
            if mine != other:
                remedy = {"mesh": "call expert_mesh with equal arguments on all ranks"}.get(
                    what, "build it from the same config and seed on all ranks, or load one checkpoint"
                )
                raise DistributedError(
                    f"the model's {what} differ between rank {dist.get_rank()} and rank {rank}; {remedy}"
                )


def _digest(parameter: nn.Parameter) -> torch.Tensor:
    """A few values and the sum: enough to tell two initialisations apart, without reading pages twice."""
    if parameter.is_meta or parameter.numel() == 0:
        return torch.zeros((), dtype=torch.float64)
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // 1024)].double().sum().cpu()


def _hash(data: str | bytes) -> int:
    return zlib.crc32(data.encode() if isinstance(data, str) else data)
