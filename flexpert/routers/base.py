"""What every router is."""

from __future__ import annotations

from torch import Tensor, nn

from flexpert.core.config import require_int
from flexpert.core.context import RoutingContext
from flexpert.core.routing import AnyRouting
from flexpert.core.seeding import Initial


class Router(nn.Module):
    """Maps tokens to a routing.

    A router of one's own is any module with this `forward`; to be named in configs, something that makes it
    from `(config, **options)` is registered by `@ROUTERS.register(name)` or the entry-point group
    `flexpert.routers`.

    Args:
        model_dim: D.
        num_experts: E.

    Attributes:
        dense: True where `forward` returns a `DenseRouting`.
        initial: what parameters and buffers begin with, by name.
    """

    dense: bool = False

    def __init__(self, *, model_dim: int, num_experts: int) -> None:
        super().__init__()
        require_int("model_dim", model_dim, least=1)
        require_int("num_experts", num_experts, least=1)
        self.model_dim, self.num_experts = model_dim, num_experts
        self.initial: dict[str, Initial] = {}

    def forward(self, x_TD: Tensor, context: RoutingContext) -> AnyRouting:
        """Route T tokens.

        Args:
            x_TD: tokens, any floating dtype.
            context: facts and overrides of the call, its tensors flattened to T.

        Returns:
            The routing; weights in fp32 (fp64 for fp64 input).
        """
        raise TypeError(f"{type(self).__name__} must define forward(x_TD, context) -> Routing")

    def score(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Logits (T, E) of a router built on a score function; see `flexpert.routers.scores`."""
        raise TypeError(f"{type(self).__name__} must define score(x_TD, context) -> logits_TE")

    def score_flops(self) -> int:
        """Floating-point operations of the score's matrix products per token."""
        return 0

    def flops_per_token(self) -> int:
        """Floating-point operations of the router's matrix products per token."""
        return self.score_flops()
