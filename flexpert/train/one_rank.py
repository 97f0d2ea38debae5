"""A run of one process, and with it what the loop asks of the ranks of any run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .stragglers import Stragglers
from .task import StepResult
from .tuning import NoTuning, Tuning
from .world import World

Sum = Callable[[Tensor], Tensor]


class OneRank:
    """A run of one process: nothing is exchanged.

    Attributes:
        world: the place of this process.
        device: where it computes.
        all_reduce: the differentiable sum over ranks, for `RoutingContext`; None for one process.
        tuning: what chooses the plans of steps, after `prepare`.
    """

    all_reduce: Sum | None = None

    def __init__(self, world: World | None = None, device: torch.device | None = None) -> None:
        self.world = World() if world is None else world
        self.device = torch.device("cpu") if device is None else device
        self.tuning: Tuning | NoTuning = NoTuning()

    def prepare(self, model: nn.Module) -> None:
        """Lay a model out over these ranks, for training; before the optimiser is made."""

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups as an optimiser takes them after `prepare`."""
        return groups

    def seed(self, base: int, step: int) -> None:
        """Set the random state of a step, where it does not go on from that of the step before."""

    def micro_batch(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; after the last, gradients are the whole batch's."""
        return nullcontext()

    def clip_grad_norm(self, model: nn.Module, limit: float) -> Tensor:
        """Scale the gradients down to a norm of at most `limit`; their norm before, the same on each rank."""
        return nn.utils.clip_grad_norm_(model.parameters(), limit)

    def whole(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors of a model as one process has them, on rank 0; every rank calls this."""
        return model.state_dict()

    def counted(self) -> AbstractContextManager[None]:
        """Around a step: notes what `traffic` tells of its plan."""
        return nullcontext()

    def traffic(self, steps: int) -> dict[str, Any]:
        """What to log of the experts' exchange in so many steps since the last call; every rank calls it."""
        return {}

    def timed(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Stragglers]:
        """Around training: what tells slow ranks."""
        return nullcontext(Stragglers())

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        return values

    def figures(self, result: StepResult) -> StepResult:
        """The figures of the whole batch, from those of this rank's part."""
        return result

    def from_main(self, make: Callable[[], str]) -> str:
        """What `make` returns on rank 0, which alone calls it."""
        return make()
