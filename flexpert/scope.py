"""The channel through foreign models: context in, losses and statistics out, for MoE layers at any depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.info import MoEInfo
from flexpert.core.plan import AnyPlan
from flexpert.core.recomputing import recomputing
from flexpert.core.registry import suggest
from flexpert.core.routing import AnyRouting
from flexpert.core.stats import RoutingStats

from .layer import MoE

Key = tuple[str, int]
_TOO_LATE = (
    "backward recomputes a layer whose routing_scope has ended; call backward() inside the innermost `with` "
    "that gave a context"
)


class routing_scope:  # noqa: N801  (used like a function: `with routing_scope(model) as scope`)
    """Gives every MoE layer of a model a context, and collects what their calls did.

    `with routing_scope(model, context=context) as scope:` then `scope.losses["balance"].mean()`. A context
    given to a layer's call itself wins over the scope's. Scopes may be nested: the innermost context acts,
    and all of them record.

    Under activation checkpointing call `backward()` inside the `with`: the recomputation then sees the same
    context, and is not counted again. Checkpointing must be non-reentrant (`use_reentrant=False`): the
    reentrant form loses the gradient of the losses, and is refused. To checkpoint inside a compiled graph,
    set `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`: it is one.

    Args:
        model: any module; its `MoE` layers take part. It may have none.
        context: for every call inside the scope.
        plan: how every call inside the scope runs over the ranks, or "auto"; nested scopes without one keep
            it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        context: RoutingContext | None = None,
        plan: AnyPlan | None = None,
    ) -> None:
        self.context, self.plan = context, plan
        self._layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
        self._handles: list[_Handle] = []
        self._outer: list[Any] = []

    def __enter__(self) -> routing_scope:
        self._outer = [layer.scope for _, layer in self._layers]
        self._handles = [_Handle(self.context, self.plan, outer) for outer in self._outer]
        for (_, layer), handle in zip(self._layers, self._handles, strict=True):
            layer.scope = handle
        return self

    def __exit__(self, *error: object) -> None:
        for (_, layer), handle in zip(self._layers, self._handles, strict=True):
            layer.scope = _Closed(self.context, self.plan) if handle.outer is None else handle.outer
            if handle.outer is not None and handle.context is not handle.outer.context:
                handle.outer.had_inner_context = True

    @property
    def infos(self) -> dict[Key, MoEInfo]:
        """What each call did, by (layer name, index of the call of that layer)."""
        pairs = zip(self._layers, self._handles, strict=True)
        return {(name, i): info for (name, _), handle in pairs for i, info in enumerate(handle.calls)}

    @property
    def losses(self) -> Mapping[str, Tensor]:
        """Loss terms by name, each a 1-D tensor over the calls of the layers that have it."""
        return _Losses(self.infos)

    @property
    def stats(self) -> dict[Key, RoutingStats]:
        """Statistics of each call."""
        return {key: info.stats for key, info in self.infos.items()}

    @property
    def routings(self) -> dict[Key, AnyRouting]:
        """The routing of each call."""
        return {key: info.routing for key, info in self.infos.items()}


class _Handle:
    """An open scope's end at one layer: a plain object, which a compiled graph may read and write."""

    def __init__(self, context: RoutingContext | None, plan: AnyPlan | None, outer: Any) -> None:
        self.outer = outer if isinstance(outer, _Handle) else None
        self.context, self.plan = context, plan
        if self.outer is not None:
            self.context = self.outer.context if context is None else context
            self.plan = self.outer.plan if plan is None else plan
        self.calls: list[MoEInfo] = []
        self.had_inner_context = False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a layer takes no part in the scopes of the original."""

    def wants_info(self) -> bool:
        return True

    def context_for_call(self) -> RoutingContext | None:
        if self.had_inner_context and recomputing():
            raise InputError(_TOO_LATE)
        return self.context

    def plan_for_call(self) -> AnyPlan | None:
        return self.plan

    def record(self, info: MoEInfo) -> None:
        if recomputing():
            self._refuse_reentrant(info)
            return
        self.calls.append(info)
        if self.outer is not None:
            self.outer.record(info)

    def _refuse_reentrant(self, info: MoEInfo) -> None:
        had_gradient = any(loss.requires_grad for call in self.calls for loss in call.losses.values())
        if not had_gradient and any(loss.requires_grad for loss in info.losses.values()):
            raise InputError(
                "reentrant activation checkpointing loses the gradient of the routing losses; use "
                "torch.utils.checkpoint with use_reentrant=False"
            )


class _Closed:
    """What a scope leaves behind for a recomputation that comes after its end.

    It must compute what the scope computed. With a context it would have to be the right one of several
    scopes before it; nobody can know, so that is an error. A later call outside of any scope ends its part.
    """

    def __init__(self, context: RoutingContext | None, plan: AnyPlan | None) -> None:
        self.had_context, self.plan = context is not None, plan
        self.expired = False

    def wants_info(self) -> bool:
        return not self.expired and recomputing()

    def context_for_call(self) -> None:
        if not recomputing():
            self.expired = True
        elif self.had_context and not self.expired:
            raise InputError(_TOO_LATE)

    def plan_for_call(self) -> AnyPlan | None:
        return self.plan if recomputing() and not self.expired else None

    def record(self, info: MoEInfo) -> None:
        """Nothing: the scope has its record."""


class _Losses(Mapping[str, Tensor]):
    def __init__(self, infos: Mapping[Key, MoEInfo]) -> None:
        self._terms: dict[str, list[Tensor]] = {}
        for info in infos.values():
            for name, value in info.losses.items():
                self._terms.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._terms:
            raise InputError(f"no layer of the scope gave a loss {name!r}; {suggest(name, self._terms)}")
        return torch.stack(self._terms[name])

    def __contains__(self, name: object) -> bool:
        return name in self._terms

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._terms else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)
