"""The mixture-of-experts blocks of a model: each with its experts and its router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from flexpert.core.errors import ConfigError
from flexpert.layer import MoE

from .layout import is_experts

_ROUTERS = ("gate", "router")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a model.

    Attributes:
        name: of the block, in the model's `named_modules`.
        block: the module that calls router and experts.
        router: returns (logits_TE, weights_TK, ids_TK, ...).
        experts: the experts module.
    """

    name: str
    block: nn.Module
    router: nn.Module
    experts: Any

    def num_experts(self, classes: int) -> int:
        """E, of the classes that the router scores; one model adds a class that skips all experts."""
        return classes - 1 if hasattr(self.router, "num_router_classes") else classes


def experts_of(model: nn.Module) -> dict[str, Any]:
    """Every experts module of a model by its name.

    Raises:
        ConfigError: there is none; the message says what the model has instead.
    """
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not found:
        raise ConfigError(_nothing_in(model))
    return found


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of a model, in order: modules with a child `experts` and a child that is its router.

    Flexpert's own layers are none of them: `routing_scope` watches those.

    Raises:
        ConfigError: the model has no routed experts, or a block has no module that is its router.
    """
    blocks = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        router = next((children[own] for own in _ROUTERS if own in children), None)
        if router is not None and "experts" in children and not isinstance(module, MoE):
            blocks.append(Block(name=name, block=module, router=router, experts=children["experts"]))
    if not blocks:
        name, experts = next(iter(experts_of(model).items()))
        raise ConfigError(
            f"{name} ({type(experts).__name__}) has no router beside it called {' or '.join(_ROUTERS)}"
        )
    return blocks


def _nothing_in(model: nn.Module) -> str:
    kind = type(model).__name__
    alike = [f"{n} ({type(m).__name__})" for n, m in model.named_modules() if _looks_like_experts(n)]
    if alike:
        return (
            f"{kind} has experts that do not use the interface of transformers for them: {alike[0]}; "
            f"its own implementation is the only one there is"
        )
    return (
        f"{kind} has no routed experts, so there is nothing to run on Flexpert's operators; choose a "
        f"mixture-of-experts model"
    )


def _looks_like_experts(name: str) -> bool:
    return name.rpartition(".")[2] == "experts"
