"""Every router of a model, whichever library made it: our layers', and those of transformers' blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError
from flexpert.core.registry import LOSSES, Spec, check_options, keyword_names, split_spec
from flexpert.core.routing import AnyRouting
from flexpert.core.stats import RoutingStats
from flexpert.layer import MoE
from flexpert.losses.common import SCOPES, check_scope
from flexpert.scope import routing_scope

from .transformers import RouterProbe
from .transformers.bias import find_bias
from .transformers.blocks import blocks_of

Key = tuple[str, int]
Bias = Callable[[], Tensor]


class LayerSource:
    """Flexpert's own layers; their losses are those that the layers were configured with.

    Args:
        model: with the layers.
        context: for their calls, see `routing_scope`; None leaves them that of a scope around.

    Attributes:
        layers: names of the layers, as the model's `named_modules` has them.
        biases: by layer, what returns its selection bias, for those that have one.
    """

    def __init__(self, model: nn.Module, context: RoutingContext | None) -> None:
        self._model, self._context = model, context
        self._scope, self._open = routing_scope(model), ExitStack()
        self._found = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
        self.layers = list(self._found)
        self.biases: dict[str, Bias] = {
            name: partial(_selection_bias, layer)
            for name, layer in self._found.items()
            if isinstance(getattr(layer.router, "selection_bias", None), Tensor)
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A `routing_scope` of this call, open until `close`: a recomputation needs its context."""
        self.close()
        self._scope = self._open.enter_context(routing_scope(self._model, context=self._context))
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the scope; what it saw stays."""
        self._open.close()

    @property
    def stats(self) -> dict[Key, RoutingStats]:
        """Of the scope."""
        return self._scope.stats

    @property
    def routings(self) -> dict[Key, AnyRouting]:
        """Of the scope."""
        return self._scope.routings

    def check_loss(self, spec: Spec) -> None:
        """Raise `ConfigError` unless the layers compute a term of this name."""
        if not isinstance(spec, str):
            raise ConfigError(
                f"loss={spec!r}: options of a loss are set in the layers' own config; give a name"
            )
        for name, layer in self._found.items():
            if spec not in layer.losses:
                raise ConfigError(
                    f"loss={spec!r}: {name} computes {', '.join(layer.losses) or 'none'}; add it to the "
                    f"losses in the config of the layer, or give balance_weight=0"
                )

    def loss(self, spec: Spec) -> Tensor:
        """The layers' own term of this name."""
        return self._scope.losses[str(spec)]


class ProbeSource:
    """The blocks of one model of transformers inside a model; see `LayerSource`.

    Args:
        name: of that model in the outer one; "" if it is the same.
        host: that model: its arguments tell padding from tokens.
        context: for the losses, see `RouterProbe`.
    """

    def __init__(self, name: str, host: nn.Module, context: RoutingContext) -> None:
        self._prefix = f"{name}." if name else ""
        self._probe = RouterProbe(host, context=context)
        self.layers = [self._prefix + layer for layer in self._probe.layers]
        biases = {self._prefix + block.name: find_bias(block) for block in blocks_of(host)}
        self.biases = {layer: bias for layer, bias in biases.items() if bias is not None}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The probe, attached for this call and for the recomputation in its backward."""
        self._probe.attach().clear()
        yield

    def close(self) -> None:
        """Watch no longer."""
        self._probe.detach()

    @property
    def stats(self) -> dict[Key, RoutingStats]:
        """Of the probe."""
        return {self._named(key): value for key, value in self._probe.stats.items()}

    @property
    def routings(self) -> dict[Key, AnyRouting]:
        """Of the probe."""
        return {self._named(key): value for key, value in self._probe.routings.items()}

    def check_loss(self, spec: Spec) -> None:
        """Raise `ConfigError` for a loss that there is not, or options that it has not."""
        name, options = split_spec(spec, "loss")
        term = LOSSES.get(name)
        check_options(f"loss {name!r}", options, keyword_names(term))
        check_scope(options.get("scope", "micro_batch"), getattr(term, "scopes", SCOPES))

    def loss(self, spec: Spec) -> Tensor:
        """Of the probe."""
        name, options = split_spec(spec, "loss")
        return self._probe.loss(name, **options)

    def _named(self, key: Key) -> Key:
        return self._prefix + key[0], key[1]


def hosts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost models of transformers that have routed experts of that library, by name.

    A model whose blocks are in no such model is its own host.
    """
    hosts: dict[str, nn.Module] = {}
    pretrained = _pretrained()
    for name, module in model.named_modules():
        inside = any(host == "" or name.startswith(f"{host}.") for host in hosts)
        if not inside and pretrained and isinstance(module, pretrained) and has_blocks(module):
            hosts[name] = module
    return hosts or ({"": model} if has_blocks(model) else {})


def has_blocks(model: nn.Module) -> bool:
    """Whether a model has routed experts of transformers."""
    try:
        return bool(blocks_of(model))
    except ConfigError:
        return False


def _pretrained() -> type[nn.Module] | None:
    """The class of models of transformers, where it is in use."""
    library: ModuleType | None = sys.modules.get("transformers")
    return None if library is None else library.PreTrainedModel


def _selection_bias(layer: Any) -> Tensor:
    bias: Tensor = layer.router.selection_bias
    return bias


class Routers:
    """All routers of a model, one call of the model at a time: `with routers.watching(): model(...)`.

    Args:
        model: with Flexpert's layers, or models of transformers, at any depth.
        context: for the losses: `all_reduce` for the scope "global".

    Raises:
        ConfigError: there are no routed experts, or a router that is not known.
    """

    def __init__(self, model: nn.Module, context: RoutingContext | None = None) -> None:
        context = context or RoutingContext()
        self._sources: list[LayerSource | ProbeSource] = []
        if any(isinstance(module, MoE) for module in model.modules()):
            # Where nothing is to be summed over ranks, a scope of the user's around it keeps its context.
            self._sources.append(LayerSource(model, context if context.all_reduce else None))
        hosts = hosts_of(model)
        if not hosts and not self._sources:
            blocks_of(model)  # says what the model has instead
        self._sources += [ProbeSource(name, host, context) for name, host in hosts.items()]
        self.layers = [layer for source in self._sources for layer in source.layers]
        self.biases = {layer: bias for source in self._sources for layer, bias in source.biases.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around one call of the model; what was seen stays until the next one."""
        with ExitStack() as stack:
            for source in self._sources:
                stack.enter_context(source.watching())
            yield

    def close(self) -> None:
        """After backward: watch no longer, until the next call."""
        for source in self._sources:
            source.close()

    @property
    def stats(self) -> dict[Key, RoutingStats]:
        """Statistics of each call of each layer."""
        return {key: value for source in self._sources for key, value in source.stats.items()}

    @property
    def routings(self) -> dict[Key, AnyRouting]:
        """The routing of each call of each layer."""
        return {key: value for source in self._sources for key, value in source.routings.items()}

    def check_loss(self, spec: Spec) -> None:
        """Raise `ConfigError` for a loss that not all of them have."""
        for source in self._sources:
            source.check_loss(spec)

    def loss(self, spec: Spec) -> Tensor:
        """A loss term of `flexpert.losses` for each call of each layer, 1-D, unweighted."""
        return torch.cat([source.loss(spec) for source in self._sources])
