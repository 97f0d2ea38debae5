"""Experts over many ranks: one layout of parameters, every parallelism, switched from call to call."""

from __future__ import annotations

from flexpert.core.plan import ExecutionPlan

from .faults import fault_guard
from .gradients import clip_grad_norm_, groups_by_mesh, loss_weight, no_sync
from .launch import init_process_group
from .mesh import ExpertMesh, expert_mesh
from .parallelize import parallelize
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
    "groups_by_mesh",
    "init_process_group",
    "loss_weight",
    "no_sync",
    "parallelize",
    "straggler_report",
    "time_phases",
]
