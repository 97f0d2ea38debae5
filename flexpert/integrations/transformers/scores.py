"""The gate scores behind a router's logits: which function its class applies before it chooses.

Routers return logits and the weights of their choices, not the scores of all experts, which losses and
entropies need. The function is named by an attribute or stands in the source of the class.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.errors import ConfigError

Score = Callable[[Tensor], Tensor]

SCORES: dict[str, Score] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": torch.sigmoid,
    "given": lambda probs_TE: probs_TE,
}
_FUNCTIONS = ("score_fn", "scoring_function")
_NAMES = ("expert_selection_fn", "scoring_func")


def score_of(router: nn.Module) -> tuple[str, Score]:
    """(name, function) from a router's first output to its gate scores; "given": it is them already.

    Raises:
        ConfigError: neither an attribute nor the source of the class says which.
    """
    for attribute in _FUNCTIONS:
        own: Any = getattr(router, attribute, None)
        if callable(own):
            return attribute, own
    for attribute in _NAMES:
        name = getattr(router, attribute, None)
        if name in SCORES:
            return name, SCORES[name]
    kind: Any = type(router)  # mypy takes the class of a Module for unhashable
    found = _score_in_source(kind)
    if found is None:
        raise ConfigError(
            f"the gate scores of {type(router).__name__} cannot be told from its class; give score="
            f"{' or score='.join(map(repr, SCORES))}"
        )
    return found, SCORES[found]


@functools.cache
def _score_in_source(kind: type[nn.Module]) -> str | None:
    """In `forward`, or else anywhere in the class."""
    try:
        sources = inspect.getsource(kind.forward), inspect.getsource(kind)
    except (OSError, TypeError):
        return None
    return next(filter(None, map(_named_in, sources)), None)


def _named_in(source: str) -> str | None:
    if re.search(r"return\s*\(?\s*router_prob", source):
        return "given"
    for name in ("sigmoid", "softmax"):
        if f"{name}(" in source:
            return name
    return "softmax" if "sparsemixer(" in source else None
