"""Every experts class of the installed release of transformers, built small."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

D, F, E, K = 16, 24, 5, 2
SMALL = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), F),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk"), K),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    "moe_latent_size": None,
    "router_hidden_size": D,
}
# What a class needs beside its config.
ARGUMENTS = {"Ernie4_5_VLMoeMoeExperts": {"intermediate_size": F}}


@functools.cache
def modeling_modules() -> list[ModuleType]:
    """The modeling modules that decorate experts."""
    root = Path(transformers.models.__path__[0])
    paths = sorted(root.glob("*/modeling_*.py"))
    used = [path for path in paths if "@use_experts_implementation" in path.read_text(encoding="utf-8")]
    names = [f"transformers.models.{path.parent.name}.{path.stem}" for path in used]
    return [importlib.import_module(name) for name in names]


@functools.cache
def experts_classes() -> dict[str, type[nn.Module]]:
    """Decorated classes by name; decoration leaves them a rule for the gate."""
    found = {}
    for module in modeling_modules():
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, nn.Module) and hasattr(value, "_apply_gate"):
                found[value.__name__] = value
    return found


def small_configs(module: ModuleType) -> Iterator[PreTrainedConfig]:
    """The configs of a model, those of its text part first, cut down in every size that they have."""
    home = importlib.import_module(module.__name__.replace("modeling_", "configuration_"))
    kinds = [
        value
        for value in vars(home).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedConfig)
        and value.__module__ == home.__name__
    ]
    for kind in sorted(kinds, key=lambda kind: "Text" not in kind.__name__):
        yield shrink(kind())


def shrink(config: PreTrainedConfig, **sizes: object) -> PreTrainedConfig:
    """The config with the small sizes it has a place for, and others."""
    config.allow_global_per_layer_attribute_access = True  # of the one whose layers differ
    for name, value in {**SMALL, **sizes}.items():
        if hasattr(config, name) and not isinstance(getattr(config, name), list | tuple):
            setattr(config, name, value)
    return config


def build_experts(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """An experts module with random weights."""
    module = importlib.import_module(kind.__module__)
    errors = []
    for config in small_configs(module):
        config._experts_implementation = "eager"
        try:
            experts = kind(config, **ARGUMENTS.get(kind.__name__, {}))
        except (AttributeError, TypeError) as error:  # not the config of this class
            errors.append(f"{type(config).__name__}: {error}")
            continue
        return randomised(experts).to(dtype)
    raise AssertionError(f"{kind.__name__} builds from none of its configs: {errors}")


@functools.cache
def block_classes() -> dict[str, type[nn.Module]]:
    """The classes that build a decorated experts class, by name."""
    found = {}
    for experts in experts_classes():
        module = importlib.import_module(experts_classes()[experts].__module__)
        for name, value in vars(module).items():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if not (own and issubclass(value, nn.Module) and "__init__" in vars(value)):
                continue
            if f" {experts}(" in inspect.getsource(value.__init__):
                found[name] = value
    return found


def build_block(kind: type[nn.Module]) -> nn.Module:
    """A block with random weights."""
    errors = []
    for config in small_configs(importlib.import_module(kind.__module__)):
        for place in ((), (0,)):
            try:
                block = kind(config, *place)
            except (AttributeError, TypeError) as error:  # not its config, or not its arguments
                errors.append(f"{type(config).__name__}: {error}")
                continue
            config._experts_implementation = "eager"
            return randomised(block)
    raise AssertionError(f"{kind.__name__} builds from none of its configs: {errors}")


# Tables of exceptions name the classes of one release; others are tried as far as they are alike.
WRITTEN_FOR = "5.23.0"
of_this_release = pytest.mark.skipif(
    transformers.__version__ != WRITTEN_FOR, reason=f"the tables are of transformers {WRITTEN_FOR}"
)


def randomised(module: nn.Module) -> nn.Module:
    """The module with weights near 1/4, biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module


def routed(tokens: int = 13, dtype: torch.dtype = torch.float32, seed: int = 1) -> SimpleNamespace:
    """Tokens, distinct experts for each (one expert gets none), and fp32 weights; a gradient to go back."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, E, generator=g)
    scores[:, E - 2] = -1.0
    values, ids_TK = scores.topk(K, dim=-1)
    x_TD = torch.randn(tokens, D, generator=g).to(dtype)
    return SimpleNamespace(
        x=x_TD, ids=ids_TK, weights=values.softmax(-1), grad=torch.randn(tokens, D, generator=g).to(dtype)
    )
