"""The one line that puts a model on our operators."""

from __future__ import annotations

from torch import nn

from .blocks import experts_of
from .layout import check_layout
from .library import NAME, enable_interfaces
from .packed import PackedExperts


def enable(model: nn.Module | None = None) -> None:
    """Make the experts implementation `flexpert` known to transformers; with a model, set it there.

    Afterwards `from_pretrained(..., experts_implementation="flexpert")` and
    `model.set_experts_implementation("flexpert")` work, on ordinary and on FP8 weights.

    Args:
        model: a model of transformers, or any module with some in it, to be switched at once. (Only this way
            is a model without routed experts an error: `set_experts_implementation` says nothing then.)

    Raises:
        ConfigError: transformers is missing; the model has no routed experts, or weights in a layout that is
            not known. Nothing has changed then.
    """
    if model is None:
        enable_interfaces()
        return
    if any(isinstance(module, PackedExperts) for module in model.modules()):
        enable_interfaces()  # packed experts run on our operators already
        return
    found = experts_of(model)
    for name, experts in found.items():
        check_layout(experts, name)
    enable_interfaces()
    for experts in found.values():
        experts.config._experts_implementation_internal = NAME
