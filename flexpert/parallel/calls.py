"""Which collective of PyTorch's an error came from, where PyTorch called it: told by the frames of the error.

A backend says neither operation nor group. The functions that were being called know both.
"""

from __future__ import annotations

import traceback
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.nn.parallel import DistributedDataParallel

# Parts of file names, and what they are parts of.
_CALLERS = {
    "torch/nn/parallel/distributed": "DDP",
    "torch/distributed/fsdp/": "FSDP",
    "torch/distributed/tensor/": "DTensor",
    "torch/distributed/checkpoint/": "torch.distributed.checkpoint",
}


def call_of(error: BaseException) -> str | None:
    """Operation and group of the collective that failed, for messages; None where the frames do not tell."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        if (found := _operation(frame)) is not None:
            operation, group = found
            return f"{_caller(frames)}{operation} on {group}"
    return None


def describe_group(group: Any) -> str:
    """Its description, ranks and this rank."""
    ranks = tuple(dist.get_process_group_ranks(group))
    name = "all ranks" if group is dist.group.WORLD else group.group_desc
    return f"{name!r} (ranks {ranks}, this is {dist.get_rank()})"


def _describe_mesh(mesh: DeviceMesh) -> str:
    if mesh.ndim == 1:
        return f"group {describe_group(mesh.get_group())}"
    ranks = tuple(mesh.mesh.flatten().tolist())
    return f"an axis of the mesh {mesh.mesh_dim_names} (ranks {ranks}, this is {dist.get_rank()})"


def _operation(frame: FrameType) -> tuple[str, str] | None:
    """What a frame calls, and on what; None where it calls no collective."""
    name, values = frame.f_code.co_name, frame.f_locals
    own = values.get("self")
    if isinstance(own, DistributedDataParallel):
        return "set-up", f"group {describe_group(own.process_group)}"
    if isinstance(own, DTensor) and name in ("full_tensor", "redistribute"):
        return name, _describe_mesh(own.device_mesh)
    spec = values.get("current_spec")
    if name == "redistribute_local_tensor" and isinstance(spec, DTensorSpec):  # operators call it too
        return "redistribute", _describe_mesh(spec.mesh)
    if (
        frame.f_globals.get("__name__") != dist.distributed_c10d.__name__
        or name not in dist.distributed_c10d.__all__
    ):
        return None
    group = values.get("group")
    group = dist.group.WORLD if group is None else group
    return (name, f"group {describe_group(group)}") if isinstance(group, dist.ProcessGroup) else None


def _caller(frames: list[FrameType]) -> str:
    for frame in reversed(frames):
        file = frame.f_code.co_filename.replace("\\", "/")
        for part, caller in _CALLERS.items():
            if part in file:
                return f"{caller}: "
    return ""
