"""The way to `transformers`, an optional package, and to what this room needs of it."""

from __future__ import annotations

from types import ModuleType

from flexpert.core.errors import ConfigError

NAME = "flexpert"
_LEAST = "5.20"


def moe_module() -> ModuleType:
    """`transformers.integrations.moe`.

    Raises:
        ConfigError: transformers is not installed, or has no interface for experts.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "flexpert.integrations.transformers needs the package transformers: pip install 'flexpert[hf]'"
        ) from error
    try:
        from transformers.integrations import moe
    except ImportError as error:
        raise ConfigError(
            f"transformers {transformers.__version__} has no interface for experts "
            f"(transformers.integrations.moe): pip install 'transformers>={_LEAST}'"
        ) from error
    return moe


def enable_interfaces() -> None:
    """Register our function on the plain and on the FP8 interface; again and again is once."""
    moe = moe_module()
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface

    from .experts import experts_forward
    from .fp8 import fp8_experts_forward

    moe.ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, fp8_experts_forward)
