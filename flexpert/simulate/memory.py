"""Bytes of one rank in a training step of a whole model, as named parts."""

from __future__ import annotations

from collections.abc import Sequence

from flexpert.core.plan import ExecutionPlan
from flexpert.tune import LayerShape, Workload
from flexpert.tune.memory import memory_of
from flexpert.tune.workload import DTYPES

from .job import JobPlan
from .model import Block, Model

Layer = tuple[LayerShape, Workload]


def memory_of_job(
    model: Model, plan: JobPlan, samples: int, layers: Sequence[Layer | None]
) -> dict[str, int]:
    """Bytes on the rank that holds most.

    Args:
        model: trained with AdamW.
        plan: of the job.
        samples: of one rank in one pass.
        layers: for each block its layer on the ranks and the layer's rows, None without experts.
    """
    stored, computed = DTYPES[model.parameter_dtype].itemsize, DTYPES[model.dtype].itemsize
    held = -(-model.dense_params // plan.dense_shards) * stored
    parts = {"dense parameters": held, "dense gradients": held, "dense optimizer": 2 * held}
    if plan.dense_shards > 1:
        # The block that is computed and the next one are gathered.
        parts["gathered dense"] = 2 * max(block.params for block in model.blocks) * computed
    elif computed != stored:
        parts["cast dense"] = model.dense_params * computed
    blocks = [
        _block(block, plan.execution, samples * block.tokens, computed, layer)
        for block, layer in zip(model.blocks, layers, strict=True)
    ]
    for name in ("parameters", "gradients", "optimizer"):
        parts[f"expert {name}"] = sum(found.get(name, 0) for found in blocks)
    kept = [found["activations"] + found.get("gathered parameters", 0) for found in blocks]
    if plan.checkpointing:
        inputs = sum(samples * block.tokens * block.width * computed for block in model.blocks)
        parts["activations"] = inputs + max(kept)
    else:
        parts["activations"] = sum(kept)
    parts["buffers"] = max(found.get("buffers", 0) for found in blocks)
    return parts


def _block(
    block: Block, execution: ExecutionPlan, tokens: int, itemsize: int, layer: Layer | None
) -> dict[str, int]:
    dense = int(tokens * block.activations * itemsize)
    if layer is None:
        return {"activations": dense}
    shape, workload = layer
    found = memory_of(shape, execution, workload)
    return {**found, "activations": found["activations"] + dense}
