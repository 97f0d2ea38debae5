"""The mixture-of-experts layer: route -> dispatch -> experts -> combine.

Letters: T tokens, D model_dim, O output_dim, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from flexpert.core.config import MoEConfig, set_builder
from flexpert.core.context import RoutingContext
from flexpert.core.errors import CheckpointError, ConfigError, InputError
from flexpert.core.info import MoEInfo
from flexpert.core.plan import AnyPlan
from flexpert.core.stats import measure
from flexpert.core.unset import UNSET, UnsetType

from .combine import WeightedSum, build_combine
from .experts import ExpertBank, SharedExpert, build_experts, build_shared
from .losses import Loss, build_losses
from .routers import Router, build_router
from .transport import LocalTransport

_DEFAULT = RoutingContext()


class LayerScope(Protocol):
    """What `routing_scope` leaves on a layer: the context in, what the call did out."""

    def wants_info(self) -> bool:
        """Whether losses and statistics of the call that is about to run are to be computed."""

    def context_for_call(self) -> RoutingContext | None:
        """The context of the call that is about to run; None where the scope does not apply."""

    def plan_for_call(self) -> AnyPlan | None:
        """The plan of the call that is about to run; None where the scope has none."""

    def record(self, info: MoEInfo) -> None:
        """Take what a call did."""


class MoE(nn.Module):
    """Mixture of experts: each token is computed by the experts its router gives it.

    `MoE(config)` builds every part from a `MoEConfig`; `MoE(router=..., experts=...)` takes parts, which may
    be any modules that keep their contracts.

    Args:
        config: the layer as data.
        router: maps (x_TD, context) to a routing; see `flexpert.routers.Router`.
        experts: bank of experts; see `flexpert.experts.ExpertBank`.
        combine: how results become outputs; the weighted sum by default.
        shared: module (T, D) -> (T, O) whose output is added for every token.
        losses: loss terms by name.

    Raises:
        ConfigError: parts that do not fit each other.
    """

    def __init__(
        self,
        config: MoEConfig | None = None,
        *,
        router: Router | None = None,
        experts: ExpertBank | None = None,
        combine: WeightedSum | None = None,
        shared: nn.Module | None = None,
        losses: Mapping[str, Loss] | None = None,
    ) -> None:
        super().__init__()
        if config is not None:
            if any(part is not None for part in (router, experts, combine, shared, losses)):
                raise ConfigError(
                    "give either config or parts, not both; change a part with dataclasses.replace(config)"
                )
            router, experts, shared = build_router(config), build_experts(config), build_shared(config)
            combine, losses = build_combine(config), build_losses(config)
        elif router is None or experts is None:
            raise ConfigError("MoE needs a config, or a router and experts")
        for name in ("num_experts", "model_dim"):
            routed, own = getattr(router, name, None), getattr(experts, name)
            if routed not in (None, own):
                raise ConfigError(
                    f"the router has {name}={routed}, the experts {name}={own}; make them equal"
                )
        self.config = config
        self.router, self.experts = router, experts
        self.combine = WeightedSum() if combine is None else combine
        self.shared = shared
        self.losses: dict[str, Loss] = dict(losses or {})
        dense = getattr(router, "dense", False)
        if dense and self.combine.needs_selection:
            raise ConfigError(
                f"{type(self.combine).__name__} weighs choices, and {type(router).__name__} makes none: "
                f"every token reads all slots; use combine='sum'"
            )
        # How rows reach their experts; `flexpert.parallel.parallelize` puts another in its place.
        self.transport: Any = LocalTransport(fused=self.combine.plain and experts.has_fused and not dense)
        self.register_load_state_dict_pre_hook(_check_shapes)
        self.scope: LayerScope | None = None  # set by routing_scope for the time of its `with`

    def forward(
        self,
        x: Tensor,
        *,
        context: RoutingContext | None = None,
        top_k: int | UnsetType = UNSET,
        capacity_factor: float | None | UnsetType = UNSET,
        plan: AnyPlan | None = None,
        return_info: bool = False,
    ) -> Any:
        """Compute the layer.

        Args:
            x: tokens (..., model_dim), floating point; may be empty.
            context: mask, ids and overrides of this call; wins over that of a surrounding `routing_scope`.
            top_k: experts per token for this call.
            capacity_factor: capacity for this call; None means dropless.
            plan: how this call runs over the ranks, "auto" for the tuner's choice; it changes no result.
            return_info: return (output, `MoEInfo`).

        Returns:
            The output (..., output_dim) in x's dtype. A dropped or padding token gets 0 from the routed
            experts.

        Raises:
            InputError: a tensor or override that does not fit.
        """
        self._check(x)
        scope = self.scope
        if scope is not None:
            context = scope.context_for_call() if context is None else context
            plan = scope.plan_for_call() if plan is None else plan
        context = (context or _DEFAULT).with_overrides(top_k, capacity_factor).for_tokens(x.shape[:-1])
        x_TD = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        real_TD = context.hide_padding(x_TD)
        recording = scope is not None and scope.wants_info()
        y_TO: Tensor | None = None
        if not recording and not return_info:
            y_TO = self.transport.at_once(real_TD, self.router, self.experts, context, plan)
        if y_TO is None:
            routing = self.router(real_TD, context)
            y_TO = self.transport(real_TD, routing, self.experts, self.combine, plan)
        assert y_TO is not None
        if self.shared is not None:
            y_TO = y_TO + self.shared(x_TD)
        y = y_TO if x.dim() == 2 else y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])  # FSDP warns of views
        if not recording and not return_info:
            return y
        context = self.transport.complete(context)
        losses = {name: term(routing, context) for name, term in self.losses.items()}
        info = MoEInfo(losses=losses, stats=measure(routing, context), routing=routing)
        if scope is not None and recording:
            scope.record(info)
        return (y, info) if return_info else y

    def num_active_params(self) -> int:
        """Parameters a token meets: everything outside the experts, and the K largest experts."""
        per_expert = sorted(self.experts.params_of_experts(), reverse=True)
        everything, experts = (sum(p.numel() for p in m.parameters()) for m in (self, self.experts))
        return everything - experts + sum(per_expert[: self._top_k()])

    def flops_per_token(self) -> int:
        """Floating-point operations of the matrix products per token, with its K costliest experts."""
        per_expert = sorted(self.experts.flops_of_experts(), reverse=True)
        shared = self.shared.flops_per_token() if isinstance(self.shared, SharedExpert) else 0
        return self.router.flops_per_token() + sum(per_expert[: self._top_k()]) + shared

    def _top_k(self) -> int:
        return int(getattr(self.router, "top_k", self.experts.num_experts))

    def _check(self, x: Tensor) -> None:
        dim = self.experts.model_dim
        if not isinstance(x, Tensor):
            raise InputError(f"x is a {type(x).__name__}; expected a tensor (..., model_dim={dim})")
        if x.dim() < 1 or x.shape[-1] != dim:
            raise InputError(f"x has shape {tuple(x.shape)}; expected (..., model_dim={dim})")
        if not x.is_floating_point():
            raise InputError(f"x has dtype {x.dtype}; expected a floating dtype (convert with x.float())")
        own = (weight for weight in self.router._parameters.values() if weight is not None)
        parameter = next(own, None)
        if parameter is None:
            parameter = next(self.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            raise InputError(
                f"x is on {x.device}, the layer on {parameter.device}; move one of them with .to(device)"
            )


def _check_shapes(layer: nn.Module, tensors: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse tensors of another shape before any of the layer's is copied."""
    for name, own in layer.state_dict().items():
        given = tensors.get(prefix + name)
        if given is not None and given.shape != own.shape:
            raise CheckpointError(
                f"{prefix}{name} has shape {tuple(given.shape)} in the checkpoint, "
                f"{tuple(own.shape)} in this layer; build the layer from the checkpoint's config"
            )


@set_builder
def build(config: MoEConfig) -> MoE:
    """The layer of a configuration; `MoEConfig.build` calls this."""
    return MoE(config)
