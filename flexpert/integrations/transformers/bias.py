"""The selection bias of a model's routers, which transformers has and nothing there updates.

Loss-free balancing (Wang et al., arXiv 2408.15664) adds a bias to the gate scores for the choice alone.
Models keep it in the router, in the block, or in a child of the router.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from flexpert.balancers import BiasBalancer
from flexpert.core.errors import ConfigError

from .blocks import Block, blocks_of

NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def find_bias(block: Block) -> Callable[[], Tensor] | None:
    """What returns the bias (E,) of a block, a view of the model's own; None where it has none."""
    owners = [block.router, block.block, *block.router.children()]
    for owner in owners:
        for name in NAMES:
            if isinstance(getattr(owner, name, None), Tensor):
                return _reader(owner, name, block)
    return None


def _reader(owner: nn.Module, name: str, block: Block) -> Callable[[], Tensor]:
    def read() -> Tensor:
        bias_C: Tensor = getattr(owner, name).detach().view(-1)
        return bias_C[: block.num_experts(len(bias_C))]

    return read


def bias_balancer(model: nn.Module, *, rate: float = 0.001, rule: str = "sign") -> BiasBalancer:
    """A `BiasBalancer` of the biases that a model of transformers has.

    Call `observe(probe.stats)` after each micro-batch, with a `RouterProbe` of the same model, and `step()`
    after each step of the optimiser.

    Args:
        model: its layers have the names that `RouterProbe` gives them.
        rate, rule: as of `BiasBalancer`.

    Raises:
        ConfigError: the model has no routed experts, or none of its routers has such a bias.
    """
    blocks = blocks_of(model)
    found = {block.name: find_bias(block) for block in blocks}
    biases = {name: bias for name, bias in found.items() if bias is not None}
    if not biases:
        kinds = sorted({type(block.router).__name__ for block in blocks})
        raise ConfigError(
            f"the routers of {type(model).__name__} ({', '.join(kinds)}) have no selection bias "
            f"({', '.join(NAMES)}); balance this model by a loss: RouterProbe(model).loss()"
        )
    return BiasBalancer.of_biases(biases, rate=rate, rule=rule)
