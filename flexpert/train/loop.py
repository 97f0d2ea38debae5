"""The training loop: step, log, checkpoint, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flexpert.balancers import BiasBalancer
from flexpert.core.errors import FlexpertError
from flexpert.monitor.metrics import MetricsWriter

from .checkpoint import latest_checkpoint
from .config import TrainConfig
from .lines import Clock, MetricsLines, Report
from .one_rank import OneRank
from .saver import CheckpointSaver
from .schedule import warmup_cosine
from .state import collect_state, restore_checkpoint
from .task import StepResult, Task


def total_steps(task: Task, config: TrainConfig) -> int:
    """Optimiser steps of the whole run."""
    return max(1, round(config.optimizer.epochs * task.steps_per_epoch))


def fit(
    task: Task,
    config: TrainConfig,
    folder: Path,
    writer: MetricsWriter | None,
    report: Report,
    ranks: OneRank | None = None,
) -> float:
    """Train to the end, from the newest checkpoint in `folder/checkpoints` where there is one.

    The weights after step n are the same, bit for bit, whether the run was interrupted or not (same machine,
    same settings); on several ranks with plans that are static or deterministic, else up to the order of sums
    from where the interrupted run's log of plans ends.

    Args:
        task: model, data and loss; on several ranks after `ranks.prepare(task.model)`.
        config: settings.
        folder: of the run.
        writer: gets each line of metrics; None on other ranks than 0.
        report: called with each line of metrics, for a person to see; on rank 0.
        ranks: that train together; this process alone if not given.

    Returns:
        Seconds spent in training, those of earlier parts of an interrupted run included.
    """
    ranks = OneRank() if ranks is None else ranks
    groups = ranks.groups(task.parameter_groups(config.optimizer.weight_decay))
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, fused=True)
    balancer = _balancer(task, config)
    start, before = _resume(task, optimizer, folder, ranks)
    if writer is not None:
        writer.rewind(start)
    total, clock = total_steps(task, config), Clock(before)
    lines = MetricsLines(task, ranks, clock, start, total, writer, report)
    saving = CheckpointSaver(folder / "checkpoints", asynchronous=config.checkpoint_async)
    with saving as saver, ranks.timed(task.model, optimizer) as stragglers:
        for step in range(start, total):
            with ranks.tuning.step(step), ranks.counted():
                result = _step(task, ranks, optimizer, config, step, total)
            if balancer is not None:
                balancer.observe(result.stats)
                balancer.step(ranks.total)
            done = step + 1
            if done % config.log_every == 0 or done == total:
                lines.add(done, result, optimizer.param_groups[0]["lr"], stragglers)
            if done % config.checkpoint_every == 0 or done == total:
                state = _state(config, ranks, clock.seconds())
                with stragglers.paused():
                    saver.save(done, collect_state(task.model, optimizer), state)
    ranks.tuning.finish()
    return clock.seconds()


def _balancer(task: Task, config: TrainConfig) -> BiasBalancer | None:
    """What moves the selection biases of the model's routers, where they have some."""
    if all(getattr(module, "selection_bias", None) is None for module in task.model.modules()):
        return None
    return BiasBalancer(task.model, rate=config.optimizer.bias_rate)


def _resume(task: Task, optimizer: torch.optim.Optimizer, folder: Path, ranks: OneRank) -> tuple[int, float]:
    """Steps done and seconds spent so far; every rank reads its parts of the checkpoint that rank 0 found."""
    path = ranks.from_main(lambda: str(latest_checkpoint(folder / "checkpoints") or ""))
    if not path:
        ranks.tuning.begin(folder, 0, None)
        return 0, 0.0
    checkpoint = restore_checkpoint(Path(path), task.model, optimizer)
    ranks.tuning.begin(folder, checkpoint.step, checkpoint.state.get("tuner"))
    return checkpoint.step, float(checkpoint.state.get("seconds", 0.0))


def _state(config: TrainConfig, ranks: OneRank, seconds: float) -> dict[str, Any]:
    """What a checkpoint keeps besides tensors."""
    known = ranks.tuning.state()
    return {"seconds": seconds, "config": config.to_dict(), **({} if known is None else {"tuner": known})}


def _step(
    task: Task,
    ranks: OneRank,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
    total: int,
) -> StepResult:
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr * warmup_cosine(step, total, config.optimizer.warmup)
    optimizer.zero_grad(set_to_none=True)
    task.model.train()
    ranks.seed(config.seed, step)
    results = []
    parts = config.optimizer.accumulate
    for part in range(parts):
        with ranks.micro_batch(task.model, last=part == parts - 1):
            result = task.loss(step, part, parts)
            result.loss.backward()
        results.append(result)
    norm = ranks.clip_grad_norm(task.model, config.optimizer.clip)
    if not torch.isfinite(norm):
        raise FlexpertError(
            f"the gradient of step {step + 1} is not finite; lower optimizer.lr "
            f"or optimizer.clip and start anew"
        )
    optimizer.step()
    return StepResult.merged(results)
