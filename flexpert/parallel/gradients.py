"""One gradient contract: after backward a parameter's gradient is the mean over all ranks of d(local loss).

Dense layers get that from DistributedDataParallel or FSDP. Expert parameters get their replica's sum,
divided, in the collectives of their own backward; what is left is the mean over ranks with equal copies,
taken here once per backward. A mean of what is already equal changes nothing, so gradients may be accumulated
over several backward passes with or without it in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flexpert.core.errors import InputError

from .group import Group
from .heartbeat import heartbeat_of
from .mesh import ExpertMesh
from .pending import failure


class GradientSync:
    """Averages the gradients of the parameters it watches at the end of each backward.

    Attributes:
        enabled: False leaves gradients to be averaged in a later backward; see `no_sync`.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._pending: dict[int, tuple[nn.Parameter, Group]] = {}
        self._count = 0

    def watch(self, parameter: nn.Parameter, group: Group) -> None:
        """Average this parameter's gradient over a group, whose ranks all watch it in this order."""
        if group.size == 1:
            return
        place, self._count = self._count, self._count + 1

        def note(_: Tensor) -> None:
            if not self.enabled:
                return
            if not self._pending:
                torch.autograd.Variable._execution_engine.queue_callback(self._flush)
            self._pending[place] = (parameter, group)

        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # else it takes no hook, and one may be trained later
        parameter.register_post_accumulate_grad_hook(note)
        parameter.requires_grad_(trained)

    def _flush(self) -> None:
        # In the order of watching, whatever the order of arrival was: the same on every rank.
        work = [
            group.all_reduce(_local(parameter.grad), "avg", async_op=True)
            for _, (parameter, group) in sorted(self._pending.items())
        ]
        self._pending.clear()
        for pending in work:
            pending.wait()


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without averaging them over ranks; the first backward after the `with` does.

    For all but the last backward of a step: saves the traffic of the averages, of dense layers (those that
    `parallelize` wrapped) and of experts. What experts exchange to compute their gradients at all is not
    saved.
    """
    modules: list[Any] = list(model.modules())

    def switch(on: bool) -> None:
        for module in modules:
            if hasattr(module, "set_requires_gradient_sync"):  # of DDP and FSDP
                module.set_requires_gradient_sync(on)
            if hasattr(module, "gradient_sync"):
                module.gradient_sync.enabled = on

    switch(False)
    try:
        yield
    finally:
        switch(True)


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Iterable[Tensor], max_norm: float, *, foreach: bool | None = None
) -> Tensor:
    """Scale all gradients so that their joint 2-norm, over every mesh, is at most `max_norm`.

    It is the norm that one process would have: a gradient that is cut over ranks counts with all its parts,
    one that several ranks have copies of counts once. All ranks must call it.

    Args:
        parameters: the model, or its parameters; plain tensors (equal on all ranks) and DTensors of any
            meshes.
        max_norm: > 0; infinity only measures.
        foreach: as in `torch.nn.utils.clip_grad_norm_`, for the scaling.

    Returns:
        The norm before scaling, a scalar.
    """
    if not max_norm > 0:
        raise InputError(f"max_norm={max_norm!r}: expected a number > 0")
    tensors = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    gradients = [p.grad for p in tensors if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    shares: dict[Any, Tensor] = {}  # of each mesh: this rank's part of the squared norm
    for gradient in gradients:
        square = torch.linalg.vector_norm(_local(gradient), dtype=torch.float64) ** 2
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            shares[mesh] = shares.get(mesh, 0) + square / _copies(gradient)
        else:
            total += square
    for mesh, share in shares.items():
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                _sum_over(share, mesh, dim)
        total += share
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    locals_ = [_local(gradient) for gradient in gradients]
    if foreach is not False:
        torch._foreach_mul_(locals_, scale.to(locals_[0].dtype))
    else:
        for local in locals_:
            local.mul_(scale.to(local.dtype))
    return norm.float()


def loss_weight(count: int, mesh: ExpertMesh) -> float:
    """The factor on a mean over `count` local tokens (or samples) that makes the mean over ranks global.

    Ranks with unequal numbers of tokens would otherwise count each token of a small rank more than one of a
    large rank: W * count / (sum of all ranks' counts); 0 for no tokens. All ranks of the mesh must call it.

    Args:
        count: what the local loss is a mean over; >= 0.
        mesh: the ranks.
    """
    if count < 0:
        raise InputError(f"count={count!r}: expected a number >= 0")
    total = torch.tensor([float(count)], dtype=torch.float64)
    mesh.everyone.all_reduce(total, "sum").wait()
    return mesh.everyone.size * count / max(float(total), 1.0)


def groups_by_mesh(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups split so that each holds tensors of one mesh, or plain ones.

    Fused and foreach optimisers refuse a group with both.

    Args:
        groups: as for a `torch.optim` optimiser; all other settings are kept.
    """
    result = []
    for group in groups:
        parts: dict[Any, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            parts.setdefault(mesh, []).append(parameter)
        result += [{**group, "params": params} for params in parts.values()]
    return result


def _sum_over(share: Tensor, mesh: DeviceMesh, dim: int) -> None:
    group = mesh.get_group(dim)
    try:
        torch.distributed.all_reduce(share, group=group)
    except RuntimeError as error:
        ranks = tuple(torch.distributed.get_process_group_ranks(group))
        axis = (mesh.mesh_dim_names or range(mesh.ndim))[dim]
        what = f"clip_grad_norm_: all_reduce on mesh axis {axis!r} (ranks {ranks}) failed"
        raise failure(what, error, heartbeat_of(ranks)) from error


def _local(tensor: Any) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _copies(tensor: DTensor) -> int:
    """Ranks that hold the same part."""
    count = 1
    for dim, placement in enumerate(tensor.placements):
        count *= tensor.device_mesh.size(dim) if placement.is_replicate() else 1
    return count
