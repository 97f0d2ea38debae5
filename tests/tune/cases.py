"""Shapes and a machine with round numbers."""

from __future__ import annotations

from flexpert.tune import LayerShape, Link, Machine, Overheads, Rate


def shape_of(**options):
    defaults = {"model_dim": 8, "hidden_dim": 16, "output_dim": 8, "num_experts": 4, "expert_ranks": 4}
    return LayerShape(**{**defaults, "ranks_per_node": 2, **options})


def machine_of(**options):
    defaults = {
        "name": "round",
        "inside": Link(latency=1e-5, bandwidth=1e9, per_message=1e-6, step=1e-5),
        "between": Link(latency=1e-4, bandwidth=1e7, per_message=1e-5, step=2e-4),
        "rates": {"float32": Rate(rows=(1, 64, 512), forward=(1e8, 2e9, 4e9), backward=(1e8, 2e9, 4e9))},
        "memory_bandwidth": 1e10,
        "overheads": Overheads(call=1e-3, call_backward=1e-3, chunk=1e-4, collective=1e-5),
    }
    return Machine(**{**defaults, **options})
