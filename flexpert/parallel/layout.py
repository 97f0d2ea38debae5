"""The one layout of parameters: each rank's part of every bank, as DTensors, whatever plan runs later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from flexpert.core.errors import ConfigError
from flexpert.core.layout import ParamLayout
from flexpert.core.plan import ExecutionPlan

from .mesh import ExpertMesh
from .meta import initial_part, knows_initial


class Bank(Protocol):
    """What the ranks need of a bank of experts; see `flexpert.experts.ExpertBank`."""

    num_experts: int
    output_dim: int
    remote: bool
    sliceable: bool
    row_independent: bool

    def hold(self, experts: range) -> bool:
        """Stack what is not stacked, for these experts alone; whether there was any."""

    def layout(self) -> Mapping[str, ParamLayout]:
        """How each parameter is cut over ranks."""

    def groups(self) -> Mapping[str, Any]:
        """The banks this one is made of."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of `nn.Module`."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """As of `nn.Module`."""


def placements(layout: ParamLayout) -> list[Placement]:
    """Of a DTensor on the axes (replica, expert, slice)."""
    cut: Placement = Replicate() if layout.slice_dim is None else Shard(layout.slice_dim)
    return [Replicate(), Shard(0), cut]


def check_bank(name: str, bank: Bank, mesh: ExpertMesh) -> None:
    """Refuse a bank that cannot be laid out on a mesh.

    Raises:
        ConfigError: experts or a hidden dimension that the mesh does not divide; the message has the remedy.
    """
    for group_name, group in bank.groups().items():
        if not group.remote:
            continue
        where = f"{name}.{group_name}" if group_name else name
        if getattr(group, "is_packed", False):
            raise ConfigError(f"{where} is packed for inference; call flexpert.unpack(model) first")
        if group.num_experts % mesh.expert_ranks:
            raise ConfigError(
                f"{where} has {group.num_experts} experts, which {mesh.expert_ranks} expert ranks do not "
                f"divide; build the mesh with more replicas or slices, so that its expert axis is a divisor "
                f"of {group.num_experts}"
            )
        tensors = tensors_of(group)
        for parameter, layout in group.layout().items():
            size = None if layout.slice_dim is None else tensors[parameter].shape[layout.slice_dim]
            if size is not None and size % mesh.slices:
                raise ConfigError(
                    f"{where}.{parameter} has a hidden dimension of {size}, which {mesh.slices} slices do "
                    f"not divide; choose a hidden_dim that is a multiple of {mesh.slices}, or fewer slices"
                )


def tensors_of(bank: Any, layouts: Mapping[str, ParamLayout] | None = None) -> dict[str, Tensor]:
    """What a call of the bank needs by name: all parameters, and the buffers that are cut over ranks.

    Args:
        layouts: of the bank, where they are known.
    """
    layouts = bank.layout() if layouts is None else layouts
    parameters, buffers = bank._parameters, bank._buffers
    if bank._modules or len(set(map(id, parameters.values()))) < len(parameters):
        parameters, buffers = dict(bank.named_parameters()), dict(bank.named_buffers())
    tables = parameters.items(), ((name, buffer) for name, buffer in buffers.items() if name in layouts)
    return {name: tensor for table in tables for name, tensor in table if tensor is not None}


def shard_bank(bank: Bank, mesh: ExpertMesh) -> list[tuple[nn.Parameter, ParamLayout | None]]:
    """Replace a bank's stacked parameters and buffers, whole on this rank, by its part of them.

    Returns the new parameters, DTensors whose global shape is the old one, with their layouts; and those that
    such a bank has beside them, whole on every rank, with None. Banks without a layout, and groups that do
    not travel, are left to what treats dense layers.
    """
    done: list[tuple[nn.Parameter, ParamLayout | None]] = []
    for group in bank.groups().values():
        if not group.remote:
            continue
        is_part = group.hold(mesh.experts_of(group.num_experts))
        layouts = group.layout()
        if not layouts:
            continue
        done += [(p, None) for name, p in group.named_parameters() if name not in layouts]
        for name, layout in layouts.items():
            path, _, key = name.rpartition(".")
            owner = group.get_submodule(path)
            old = getattr(owner, key)
            if is_part:
                local = old.detach()
            elif old.is_meta:
                local = initial_part(group, name, old.shape, layout, mesh, old.dtype)
            else:
                local = local_part(old.detach(), layout, mesh)
            whole = DTensor.from_local(local, mesh.device_mesh, placements(layout), run_check=False)
            if not isinstance(old, nn.Parameter):
                setattr(owner, key, whole)
                continue
            new = nn.Parameter(whole, requires_grad=old.requires_grad)
            setattr(owner, key, new)
            done.append((new, layout))
    return done


def laid_out(bank: Bank) -> dict[str, Tensor]:
    """The parameters and buffers that `shard_bank` replaces, by their names in the bank.

    Raises:
        ConfigError: one is on the meta device, and the bank does not know what it begins with.
    """
    found = {}
    for group_name, group in bank.groups().items():
        tensors = tensors_of(group) if group.remote else {}
        for name in group.layout() if group.remote else ():
            parameter = tensors[name]
            if parameter.is_meta and not knows_initial(group, name):
                raise ConfigError(
                    f"{type(group).__name__}.{name} is on the meta device, and the bank has no "
                    f"initial[{name!r}] to draw experts from; define it, or build the bank on a real device"
                )
            found[f"{group_name}.{name}" if group_name else name] = parameter
    return found


def local_part(whole: Tensor, layout: ParamLayout, mesh: ExpertMesh) -> Tensor:
    """This rank's part of a stacked tensor (E, ...), in memory of its own."""
    experts = mesh.experts_of(whole.shape[0])
    part = whole[experts.start : experts.stop]
    if layout.slice_dim is not None:
        part = part.chunk(mesh.slices, dim=layout.slice_dim)[mesh.slice]
    return part.clone(memory_format=torch.contiguous_format)


def check_bank_allows(plan: ExecutionPlan, bank: Any, name: str, mesh: ExpertMesh) -> None:
    """Refuse a plan that a bank cannot run.

    Raises:
        ConfigError: what the bank lacks.
    """
    if plan.r > 1 and not bank.sliceable:
        raise ConfigError(
            f"{name}: plan r={plan.r} cuts experts into slices, which {type(bank).__name__} does not declare "
            f"(sliceable=False); use r=0 or r=1"
        )
    if bank.row_independent:
        return
    together = mesh.whole.size == 1 or (plan.r == 1 and mesh.slices == 1 and plan.degree == 1)
    if not together or mesh.replicas > 1:
        raise ConfigError(
            f"{name}: the results of {type(bank).__name__} depend on which rows come together "
            f"(row_independent=False); such experts need r=1, degree=1, one slice and one replica"
        )
