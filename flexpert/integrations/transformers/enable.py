"""The one line that puts a model on our operators."""

from __future__ import annotations

from torch import nn

from .blocks import experts_of
from .layout import check_layout
from .library import NAME, enable_interfaces


def enable(model: nn.Module | None = None) -> None:
    """Make the experts implementation `flexpert` known to transformers; with a model, set it there.

    Afterwards `from_pretrained(..., experts_implementation="flexpert")` and
    `model.set_experts_implementation("flexpert")` work, on ordinary and on FP8 weights.

    Args:
        model: a model of transformers, or any module with some in it, to be switched at once.

    Raises:
        ConfigError: transformers is missing; the model has no routed experts, or weights in a layout that is
            not known. Nothing has changed then.
    """
    if model is None:
        enable_interfaces()
        return
    found = experts_of(model)
    for name, experts in found.items():
        check_layout(experts, name)
    enable_interfaces()
    for experts in found.values():
        experts.config._experts_implementation_internal = NAME
