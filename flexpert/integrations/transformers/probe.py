"""What the routers of a model do, as our routings, losses and statistics.

Letters: T tokens, K experts per token, E experts, B sequences of S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexpert import ops
from flexpert.core.context import RoutingContext
from flexpert.core.errors import ConfigError, InputError
from flexpert.core.recomputing import recomputing
from flexpert.core.registry import LOSSES
from flexpert.core.routing import Routing
from flexpert.core.stats import RoutingStats, measure, merge_stats

from .blocks import Block, blocks_of
from .inputs import ModelInputs
from .outputs import RouterOutput, read_output
from .scores import SCORES, score_of

Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class RouterCall:
    """What one router did in one call; tensors as the model made them.

    Attributes:
        layer: name of the block in the model.
        output: of the router.
        context: mask and sequence length of the call, and what the probe was given.
    """

    layer: str
    output: RouterOutput
    context: RoutingContext


class RouterProbe:
    """Watches the routers of a model; values in, values out, and nothing changes in what the model computes.

    `with RouterProbe(model) as probe:` then `loss = model(...).loss + 0.01 * probe.loss().mean()`, and
    `probe.stats`. Each call of each router is one entry, under (name of its block, index of the call), until
    `clear()` or the next `with`. Recomputation under activation checkpointing is not counted again; it must
    be non-reentrant, as it is by default. Padding tokens, as told by the model's `attention_mask`, are
    neither counted nor in a loss.

    Args:
        model: a model of transformers, or a module with some in it.
        context: for the losses: `all_reduce` for the scope "global", or a `mask` of one's own.
        score: the gate score, where a router's class does not tell: "softmax", "sigmoid" or "given".

    Raises:
        ConfigError: the model has no routed experts, or a router that is not known.
    """

    def __init__(
        self, model: nn.Module, *, context: RoutingContext | None = None, score: str | None = None
    ) -> None:
        if score is not None and score not in SCORES:
            raise ConfigError(f"score={score!r}: expected one of {', '.join(SCORES)}")
        self._model, self._context = model, context or RoutingContext()
        self._is_pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._blocks = {block.name: block for block in blocks_of(model)}
        named = (score, SCORES[score]) if score is not None else None
        self._scores = {name: named or score_of(block.router) for name, block in self._blocks.items()}
        self._hooks: list[RemovableHandle] = []
        self._calls: dict[str, list[RouterCall]] = {}
        self._inputs = {"": ModelInputs(), "decoder_": ModelInputs()}

    @property
    def layers(self) -> list[str]:
        """The names of the watched blocks, in order."""
        return list(self._blocks)

    def attach(self) -> RouterProbe:
        """Watch from now on."""
        if not self._hooks:
            self.clear()
            before = self._model.register_forward_pre_hook(self._take_inputs, with_kwargs=True)
            self._hooks = [before, *(self._watch(block) for block in self._blocks.values())]
        return self

    def detach(self) -> None:
        """Watch no longer; what was seen stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def clear(self) -> None:
        """Forget the calls so far."""
        self._calls = {name: [] for name in self._blocks}

    def __enter__(self) -> RouterProbe:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.detach()

    @property
    def calls(self) -> dict[Key, RouterCall]:
        """What was seen, as it was seen."""
        return {(name, i): call for name, calls in self._calls.items() for i, call in enumerate(calls)}

    @property
    def routings(self) -> dict[Key, Routing]:
        """The routing of each call, with logits and gate scores, differentiable."""
        return {key: self._routing(call) for key, call in self.calls.items()}

    @property
    def stats(self) -> dict[Key, RoutingStats]:
        """Statistics of each call."""
        with torch.no_grad():
            return {key: measure(self._routing(call), call.context) for key, call in self.calls.items()}

    def stats_of_layers(self) -> dict[str, RoutingStats]:
        """Statistics of each layer, over all of its calls."""
        parts: dict[str, list[RoutingStats]] = {}
        for (layer, _), stats in self.stats.items():
            parts.setdefault(layer, []).append(stats)
        return {layer: merge_stats(values) for layer, values in parts.items()}

    def loss(self, name: str = "balance", **options: Any) -> Tensor:
        """A loss term of `flexpert.losses` for each call, 1-D, unweighted, computed layer by layer.

        `balance` is 1.0 at perfect balance for every number of experts per token, and E at worst.

        Args:
            name: of the loss.
            options: of the loss, as `scope="sequence"`.

        Raises:
            InputError: no router has been called.
            ConfigError: an unknown loss.
        """
        term = LOSSES.get(name)
        calls = self.calls.values()
        if not calls:
            raise InputError("no router has been called since the probe was attached; call the model first")
        return torch.stack([term(self._routing(call), call.context, **options) for call in calls])

    def _watch(self, block: Block) -> RemovableHandle:
        def record(_: nn.Module, __: Any, given: Any) -> None:
            output = read_output(block, given)
            logits = output.logits_TE
            if recomputing():
                self._refuse_reentrant(block.name, logits)
                return
            context = inputs().context(self._context, logits.shape[0], logits.device)
            self._calls[block.name].append(RouterCall(layer=block.name, output=output, context=context))

        def inputs() -> ModelInputs:
            in_decoder = self._is_pair and "decoder" in block.name.split(".")
            return self._inputs["decoder_" if in_decoder else ""]

        return block.router.register_forward_hook(record)

    def _refuse_reentrant(self, layer: str, logits: Tensor) -> None:
        seen = self._calls[layer]
        if logits.requires_grad and seen and not any(call.output.logits_TE.requires_grad for call in seen):
            raise InputError(
                "reentrant activation checkpointing loses the gradient of the routing losses; give "
                "{'use_reentrant': False} to what enables it"
            )

    def _take_inputs(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not recomputing():
            self._inputs = {side: ModelInputs.of(model, args, kwargs, side) for side in self._inputs}

    def _routing(self, call: RouterCall) -> Routing:
        """Padding tokens choose nothing, and nobody chooses a class that is not an expert."""
        block, (score_name, score) = self._blocks[call.layer], self._scores[call.layer]
        given, logits_TC = call.output, call.output.logits_TE.float()
        num_experts = block.num_experts(logits_TC.shape[1])
        probs_TE, ids_TK = score(logits_TC)[:, :num_experts], given.ids_TK
        if logits_TC.shape[1] > num_experts:  # a class that skips all experts hides as expert 0 of weight 0
            ids_TK = ids_TK.masked_fill(given.weights_TK == 0, num_experts)
        if call.context.mask is not None:
            ids_TK = ids_TK.masked_fill(~call.context.mask[:, None], num_experts)
        taken_TK = ids_TK if given.kept_TK is None else ids_TK.masked_fill(~given.kept_TK, num_experts)
        order_N, counts_E = ops.assign(taken_TK.reshape(-1), num_experts)
        weights_TK = given.weights_TK.float().masked_fill(taken_TK >= num_experts, 0.0)
        return Routing(
            unit_N=order_N // ids_TK.shape[1],
            weight_N=weights_TK.reshape(-1).index_select(0, order_N),
            counts_E=counts_E,
            num_units=len(ids_TK),
            logits_TE=None if score_name == "given" else logits_TC[:, :num_experts],
            probs_TE=probs_TE,
            aux={"ids_TK": ids_TK},
        )
