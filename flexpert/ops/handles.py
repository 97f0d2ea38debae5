"""Arguments that travel together: how tokens choose experts, and what the experts are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenChoice(NamedTuple):
    """Token choice by a linear score: the arguments of `router_logits` and `route`.

    Attributes:
        weight_ED: of the score.
        top_k, scoring, bias_E, normalize, scale, limit, prioritized: see `flexpert.ops.route`.
    """

    weight_ED: Tensor
    top_k: int
    scoring: str = "softmax"
    bias_E: Tensor | None = None
    normalize: bool = False
    scale: float = 1.0
    limit: int | None = None
    prioritized: bool = False


class ExpertMLP(NamedTuple):
    """The experts of `grouped_mlp`, or of `grouped_mlp_packed`.

    Attributes:
        w1, b1, w2, b2, activation, recompute: see `flexpert.ops.grouped_mlp`.
        packed: (F, O) where w1 and w2 are packed; None where they are not.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str
    recompute: bool = False
    packed: tuple[int, int] | None = None
