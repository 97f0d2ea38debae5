"""How the ranks of a run work together: the one place of the training job that knows of collectives.

The convention: a rank's loss is such that its mean over ranks is the loss of the whole batch, and gradients
are averaged over ranks, as `DistributedDataParallel` does. Figures of a step follow the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flexpert.core.errors import DistributedError, FlexpertError
from flexpert.core.seeding import derive_seed
from flexpert.core.stats import reduce_stats

from .config import TrainConfig
from .task import StepResult
from .world import World, process_group, read_world

Sum = Callable[[Tensor], Tensor]


class OneRank:
    """A run of one process: nothing is exchanged.

    Attributes:
        world: the place of this process.
        device: where it computes.
        all_reduce: the differentiable sum over ranks, for `RoutingContext`; None for one process.
    """

    all_reduce: Sum | None = None

    def __init__(self, world: World | None = None, device: torch.device | None = None) -> None:
        self.world = World() if world is None else world
        self.device = torch.device("cpu") if device is None else device

    def prepare(self, model: nn.Module) -> None:
        """Ready a model for training on these ranks; before the optimiser is made."""

    def seed(self, base: int, step: int) -> None:
        """Set the random state of a step, where it does not go on from that of the step before."""

    def backward(self, model: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; after the last one they are those of the whole batch."""
        loss.backward()

    def clip_grad_norm(self, model: nn.Module, limit: float) -> Tensor:
        """Scale the gradients down to a norm of at most `limit`; their norm before, the same on each rank."""
        return nn.utils.clip_grad_norm_(model.parameters(), limit)

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors as one process would have them, to be written; every rank calls this."""
        return tensors

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        return values

    def figures(self, result: StepResult) -> StepResult:
        """The figures of the whole batch, from those of this rank's part."""
        return result

    def from_main(self, make: Callable[[], str]) -> str:
        """What `make` returns on rank 0, which alone calls it."""
        return make()


class ManyRanks(OneRank):
    """Ranks with a copy of the model each, which average their gradients.

    Args:
        world: the place of this process.
        device: where it computes.
        total: the sum of a tensor over ranks; that of the default process group if not given.
    """

    def __init__(self, world: World, device: torch.device | None = None, total: Sum | None = None) -> None:
        super().__init__(world, device)
        self._total = _sum_over_group if total is None else total
        self.all_reduce = lambda values: _Sum.apply(values, self._total)

    def seed(self, base: int, step: int) -> None:
        """Set the random state from (seed, step, rank): ranks differ, and a resumed run needs no state."""
        torch.manual_seed(derive_seed(base, "step", step, "rank", self.world.rank))

    def backward(self, model: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch; average them over ranks after the last one."""
        loss.backward()
        if last:
            self._average_gradients(model)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        return self._total(values.detach())

    def figures(self, result: StepResult) -> StepResult:
        """Means over ranks of loss and metrics, and the statistics of the whole batch."""
        values = torch.stack([result.loss.detach(), *(value.float() for value in result.metrics.values())])
        loss, *metrics = self.total(values) / self.world.size
        stats = reduce_stats(result.stats, self.total)
        return StepResult(loss, dict(zip(result.metrics, metrics, strict=True)), stats)

    def from_main(self, make: Callable[[], str]) -> str:
        """What `make` returns on rank 0, which alone calls it; an error of ours there is one everywhere."""
        error: FlexpertError | None = None
        text = ""
        if self.world.is_main:
            try:
                text = make()
            except FlexpertError as caught:
                error, text = caught, str(caught)
        content = text.encode()
        header = torch.tensor([len(content), error is not None], device=self.device)
        length, failed = self.total(header).tolist()
        body = torch.zeros(length, dtype=torch.uint8, device=self.device)
        if self.world.is_main:
            body.copy_(torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8)[:length])
        text = bytes(self.total(body).tolist()).decode()
        if error is not None:
            raise error
        if failed:
            raise DistributedError(f"rank 0 failed: {text}")
        return text

    def _average_gradients(self, model: nn.Module) -> None:
        """One sum for each dtype; a parameter that no rank has a gradient for keeps none."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        for dtype in sorted({p.dtype for p in parameters}, key=str):
            alike = [p for p in parameters if p.dtype == dtype]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
            has = torch.tensor([p.grad is not None for p in alike], dtype=dtype, device=grads[0].device)
            flat = self.total(torch.cat([has, *(grad.flatten() for grad in grads)]))
            has, *sums = flat.split([len(alike), *(grad.numel() for grad in grads)])
            for parameter, some, total in zip(alike, has.tolist(), sums, strict=True):
                if some:
                    parameter.grad = (total / self.world.size).view_as(parameter)


@contextmanager
def join(config: TrainConfig) -> Iterator[OneRank]:
    """The ranks of a run that is started now: those of torchrun, else this process alone.

    Raises:
        DistributedError: an environment that cannot be, or ranks that do not meet.
    """
    world = read_world()
    device = world.device(config.device)
    if world.size == 1:
        yield OneRank(world, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(world, device, backend=config.backend, timeout=config.timeout):
        yield ManyRanks(world, device)


def weighted(value: Tensor, weight: float) -> Tensor:
    """The value times its weight; the value itself, bit for bit, where that is 1.

    A mean over local samples, weighted by local * W / all, is a term whose mean over W ranks is the mean over
    all samples.
    """
    return value if weight == 1 else value * weight


def _sum_over_group(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    """The sum over ranks; its adjoint is the same sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, total: Sum) -> Tensor:
        ctx.total = total
        return total(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.total(grad), None
