"""What a router returned: logits, and which experts each token chose, with which weights.

Letters: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexpert.core.errors import ConfigError

from .blocks import Block


@dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """One call of a router.

    Attributes:
        logits_TE: the scores before softmax or sigmoid, or in place of them.
        weights_TK, ids_TK: the weights and the experts of each token, as it chose them.
        kept_TK: whether the expert had room for the token; None: every one has.
    """

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    kept_TK: Tensor | None = None


def read_output(block: Block, output: Any) -> RouterOutput:
    """What a router's output says.

    Raises:
        ConfigError: it has another form.
    """
    if isinstance(output, tuple) and len(output) >= 3 and all(isinstance(o, Tensor) for o in output[:3]):
        first, second, third = output[:3]
        if first.dim() > 1 and first.is_floating_point() and _are_choices(second, third):
            weights, ids = (t.reshape(-1, t.shape[-1]) for t in (second, third))
            return RouterOutput(logits_TE=first.reshape(-1, first.shape[-1]), weights_TK=weights, ids_TK=ids)
        if third.is_floating_point() and first.dtype is torch.int64 and first.shape == third.shape:
            return _of_mask(first, second, third)
    parts = output if isinstance(output, tuple) else (output,)
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    raise ConfigError(
        f"the router of {block.name} ({type(block.router).__name__}) returned {shapes}; expected "
        f"(logits (T, E), weights (T, K), ids (T, K)), or a mask (T, E), weights and logits (T, E)"
    )


def _are_choices(weights: Tensor, ids: Tensor) -> bool:
    return ids.dtype is torch.int64 and ids.shape == weights.shape


def _of_mask(mask: Tensor, weights: Tensor, logits: Tensor) -> RouterOutput:
    """Of routers with a capacity that return which expert takes a token, after drops.

    Switch Transformers have one expert per token and one weight; NLLB-MoE has two, and a weight for each
    expert, 0 for those that do not take the token.
    """
    logits_TE = logits.reshape(-1, logits.shape[-1])
    mask_TE, weights = mask.reshape(logits_TE.shape).bool(), weights.reshape(len(logits_TE), -1)
    by_expert = weights.shape[1] > 1
    ids_TK = logits_TE.topk(2 if by_expert else 1).indices
    kept_TK = (weights > 0 if by_expert else mask_TE).gather(1, ids_TK)
    weights_TK = weights.gather(1, ids_TK) if by_expert else weights
    return RouterOutput(logits_TE=logits_TE, weights_TK=weights_TK * kept_TK, ids_TK=ids_TK, kept_TK=kept_TK)
