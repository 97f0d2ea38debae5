"""Experts over many ranks: one layout of parameters, every parallelism, switched from call to call."""

from __future__ import annotations

from flexpert.core.plan import ExecutionPlan

from .gradients import clip_grad_norm_, groups_by_mesh, loss_weight, no_sync
from .mesh import ExpertMesh, expert_mesh
from .parallelize import parallelize
from .state import full_state_dict, load_full_state_dict
from .transport import ExpertParallel

__all__ = [
    "ExecutionPlan",
    "ExpertMesh",
    "ExpertParallel",
    "clip_grad_norm_",
    "expert_mesh",
    "full_state_dict",
    "groups_by_mesh",
    "load_full_state_dict",
    "loss_weight",
    "no_sync",
    "parallelize",
]
