"""The layer benchmark: one MoE layer beside a dense product, a streaming read and its peers, in one run.

Everything that is compared is built from one problem (tokens, expert ids, weights) and timed in turns, so
that a noisy machine disturbs all alike. `flexpert bench` is its command.
"""

from __future__ import annotations

from .plan import Plan, make_plan
from .run import check_output, run_benchmark, write

__all__ = ["Plan", "check_output", "make_plan", "run_benchmark", "write"]
