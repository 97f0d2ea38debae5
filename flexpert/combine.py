"""Combine objects: how the results of a token's experts become its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexpert.core.config import MoEConfig, require_bool, require_number
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.registry import check_options, keyword_names, split_spec, suggest
from flexpert.core.routing import AnyRouting, DenseRouting, Routing

from .dispatch import scatter


class WeightedSum(nn.Module):
    """y = sum of weight * result.

    Attributes:
        plain: nothing but this sum, so that a bank's fused operator may take its place.
        needs_selection: not for soft routing, which has no weight of a choice.
    """

    plain = True
    needs_selection = False

    def prepare(self, rows_ND: Tensor, routing: AnyRouting) -> Tensor:
        """The rows that the experts see."""
        return rows_ND

    def forward(self, rows_NO: Tensor, routing: AnyRouting, dtype: torch.dtype) -> Tensor:
        """Outputs (T, O) in `dtype` from the experts' results (N, O)."""
        return scatter(rows_NO, routing, dtype)


class WeightedInput(WeightedSum):
    """y = sum of E(weight * x): the weight is applied before the experts, not after."""

    plain = False
    needs_selection = True

    def prepare(self, rows_ND: Tensor, routing: AnyRouting) -> Tensor:
        """Rows times their weights."""
        assert not isinstance(routing, DenseRouting)
        return (rows_ND * routing.weight_N[:, None]).to(rows_ND.dtype)

    def forward(self, rows_NO: Tensor, routing: AnyRouting, dtype: torch.dtype) -> Tensor:
        """The plain sum of the results."""
        assert not isinstance(routing, DenseRouting)
        return scatter(rows_NO, routing, dtype, torch.ones_like(routing.weight_N))


class Scaled(WeightedSum):
    """y = scale * sum of weight * result; with `hard`, the weights are 1.

    Args:
        scale: factor on the sum (E / K restores the magnitude of a sliced dense layer, for example).
        hard: ignore the gate's weights; its gradient then comes from the losses alone.
    """

    plain = False

    def __init__(self, *, scale: float = 1.0, hard: bool = False) -> None:
        super().__init__()
        require_number("scale", scale)
        require_bool("hard", hard)
        self.scale, self.hard = scale, hard
        self.needs_selection = hard

    def forward(self, rows_NO: Tensor, routing: AnyRouting, dtype: torch.dtype) -> Tensor:
        """Outputs (T, O) in `dtype`."""
        weight_N = None
        if self.hard:
            assert not isinstance(routing, DenseRouting)
            weight_N = torch.ones_like(routing.weight_N)
        return scatter(rows_NO, routing, dtype, weight_N) * self.scale


class OnePlus(WeightedSum):
    """y = sum of (1 + weight) * result: with weights at 0 the plain sum of a dense layer's slices.

    Args:
        logits: the choice's logit in place of its weight, so that a router of zeros adds nothing to the 1.
    """

    plain = False
    needs_selection = True

    def __init__(self, *, logits: bool = False) -> None:
        super().__init__()
        require_bool("logits", logits)
        self.logits = logits

    def forward(self, rows_NO: Tensor, routing: AnyRouting, dtype: torch.dtype) -> Tensor:
        """Outputs (T, O) in `dtype`.

        Raises:
            InputError: `logits`, and the router has none.
        """
        assert not isinstance(routing, DenseRouting)
        return scatter(
            rows_NO, routing, dtype, 1 + (self._logit_N(routing) if self.logits else routing.weight_N)
        )

    def _logit_N(self, routing: Routing) -> Tensor:
        if routing.logits_TE is None:
            raise InputError(
                "combine 'one_plus' with logits=True, and the router has no logits; use a linear one"
            )
        last = routing.num_experts - 1  # rows past the real ones belong to none and are never read
        return routing.logits_TE[routing.unit_N, routing.expert_N().clamp(max=last)]


COMBINES = {"sum": WeightedSum, "weighted_input": WeightedInput, "scaled": Scaled, "one_plus": OnePlus}


def build_combine(config: MoEConfig) -> WeightedSum:
    """The combine object that a layer's config names.

    Raises:
        ConfigError: an unknown name or option; the message lists the valid ones.
    """
    name, options = split_spec(config.combine, "combine")
    if name not in COMBINES:
        raise ConfigError(f"unknown combine {name!r}: {suggest(name, COMBINES)}")
    check_options(f"combine {name!r}", options, keyword_names(COMBINES[name]))
    return COMBINES[name](**options)
