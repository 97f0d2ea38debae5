"""The MoE language model, on the Llama decoder of `transformers`; see `MoELanguageConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from flexpert.core.errors import InputError
from flexpert.routers import LinearRouter

from .collecting import CollectingMoE, LossCollector, none_of
from .moe_lm_card import language_card
from .moe_lm_config import MoELanguageConfig
from .pretrained import MoEPreTrained


@dataclass
class MoELanguageOutput(CausalLMOutputWithPast):
    """The usual output of a language model, and `aux_loss`.

    Attributes:
        aux_loss: the balance loss, mean over the MoE layers, weighted: what `loss` has besides the cross
            entropy. None for the dense twin, and in evaluation without labels.
    """

    aux_loss: Tensor | None = None


class MoELanguageModel(LlamaModel):
    """A Llama decoder with MoE layers in place of the MLPs that `MoELanguageConfig` names."""

    config_class = MoELanguageConfig

    def __init__(self, config: MoELanguageConfig) -> None:
        super().__init__(config)
        self.collector = LossCollector()
        for place in config.moe_layers():
            layer = self.layers[place]
            layer.mlp = moe = CollectingMoE(config.moe_layer(), self.collector)
            attention = layer.get_submodule("self_attn")
            attention.register_forward_pre_hook(self._take_mask, with_kwargs=True)
            if isinstance(moe.router, LinearRouter):
                nn.init.normal_(moe.router.weight, std=config.initializer_range)
            if moe.shared is not None:
                for weight in moe.shared.parameters():
                    nn.init.normal_(weight, std=config.initializer_range)
        self.post_init()

    def _take_mask(self, attention: nn.Module, args: Any, options: dict[str, Any]) -> None:
        """Before a layer's attention and experts run or are recomputed: the mask of their own call."""
        self.collector.mask = options.get("token_mask")


class MoELanguageForCausalLM(MoEPreTrained, LlamaForCausalLM):
    """`MoELanguageModel` and a head that predicts the next token.

    Use it as any model of `transformers`: `generate`, `save_pretrained`, `from_pretrained` and the Auto
    classes work. Padding tokens (`attention_mask` 0) are neither routed nor counted. Routing is changed for a
    call by a `flexpert.routing_scope` around it.
    """

    config_class = MoELanguageConfig

    def __init__(self, config: MoELanguageConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # its own would build a dense backbone
        self.model = MoELanguageModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> MoELanguageOutput | tuple[Any, ...]:
        """Predict the next token at each place.

        Args:
            input_ids: int64 (B, L). B may be 0, for a rank of several that has no sample but takes part in
                the others' exchange.
            attention_mask: (B, tokens so far), 1 for a real token; others are not routed.
            labels: int64 (B, L), `input_ids` again (they are shifted here), -100 where nothing is to be
                predicted; without them there is no loss.
            inputs_embeds: (B, L, D) in place of `input_ids`.
            return_dict: False for a tuple.
            options: see `transformers.LlamaForCausalLM`.

        Returns:
            Logits (B, L, vocab_size), and with labels the loss: cross entropy plus `aux_loss`. Whoever
            computes another loss from the logits adds `aux_loss` to it. A surrounding `routing_scope` sees
            the same terms, unweighted; `weighted_balance_loss(scope.losses)` is then the same number.
        """
        collector, given = self.model.collector, input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise InputError("neither input_ids nor inputs_embeds is given; the model needs one of them")
        collector.calls = [] if self.training or labels is not None else None
        collector.stand_in = given.shape[0] == 0
        if attention_mask is not None and attention_mask.dim() == 2 and not collector.stand_in:
            options["token_mask"] = attention_mask[:, -given.shape[1] :].bool()  # decoder layers get it
        options |= {"attention_mask": attention_mask, "labels": labels}
        try:
            base = (
                self._none(given, labels)
                if collector.stand_in
                else super().forward(
                    input_ids=input_ids, inputs_embeds=inputs_embeds, return_dict=True, **options
                )
            )
            terms = collector.terms()
        finally:
            collector.reset()
        return self.with_balance_loss(MoELanguageOutput(**base), terms, return_dict)

    def _none(self, given: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """The output for no sample, which the backbone cannot compute."""
        name = "inputs_embeds" if given.is_floating_point() else "input_ids"
        sample = {name: given.new_zeros(1, *given.shape[1:])}
        base = none_of(dict(super().forward(use_cache=False, return_dict=True, **sample)))
        return base if labels is None else {**base, "loss": base["logits"].sum()}

    def weighted_balance_loss(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The balance loss as it enters the loss.

        Args:
            losses: loss terms by name, each 1-D over the MoE layers, such as `routing_scope(...).losses`.
        """
        return self.config.balance_weight * losses[self.config.balance_loss].mean()

    def card(self) -> str:
        """The text of the model card."""
        return language_card(self)


AutoConfig.register(MoELanguageConfig.model_type, MoELanguageConfig)
AutoModel.register(MoELanguageConfig, MoELanguageModel)
AutoModelForCausalLM.register(MoELanguageConfig, MoELanguageForCausalLM)
