"""Ranks without processes: threads that run the same work in lockstep and sum tensors over themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose backward sums the gradients likewise."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, exchange: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.exchange = exchange
        return exchange(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange(grad), None


def run_ranks(size: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Results of `work(rank, all_reduce)` for every rank; `all_reduce` meets that of all the others."""
    barrier = threading.Barrier(size)
    values: list[Tensor | None] = [None] * size

    def run(rank: int) -> Any:
        def exchange(value: Tensor) -> Tensor:
            values[rank] = value.detach()
            barrier.wait(timeout=300)
            total = torch.stack(list(values)).sum(0)
            barrier.wait(timeout=300)
            return total

        try:
            return work(rank, lambda value: _Sum.apply(value, exchange))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    broken = [f.exception() for f in futures if isinstance(f.exception(), threading.BrokenBarrierError)]
    others = [f.exception() for f in futures if f.exception() and f.exception() not in broken]
    for error in (*others, *broken):
        raise error
    return [future.result() for future in futures]
