"""Experts over many ranks: one layout of parameters, every parallelism, switched from call to call."""

from __future__ import annotations

from flexpert.core.plan import ExecutionPlan

from .faults import fault_guard
from .gradients import clip_grad_norm_, groups_by_mesh, loss_weight, no_sync
from .launch import init_process_group
from .mesh import ExpertMesh, expert_mesh
from .meta import materialize
from .parallelize import parallelize
from .state import full_state_dict, load_full_state_dict
from .timers import StragglerReport, straggler_report, time_phases
from .transport import ExpertParallel

__all__ = [
    "ExecutionPlan",
    "ExpertMesh",
    "ExpertParallel",
    "StragglerReport",
    "clip_grad_norm_",
    "expert_mesh",
    "fault_guard",
    "full_state_dict",
    "groups_by_mesh",
    "init_process_group",
    "load_full_state_dict",
    "loss_weight",
    "materialize",
    "no_sync",
    "parallelize",
    "straggler_report",
    "time_phases",
]
