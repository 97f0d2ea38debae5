"""The configuration of the MoE language model and its presets."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from flexpert.core.config import MoEConfig
from flexpert.core.errors import ConfigError
from flexpert.core.registry import Spec

from .presets import from_preset


@strict
class MoELanguageConfig(LlamaConfig):
    """A `LlamaConfig` and its MoE layers: fine-grained experts and a shared one, by default.

    The design is that of DeepSeekMoE (Dai et al., arXiv 2401.06066): many narrow experts of which a token
    takes several, experts that every token visits, a dense first layer; balanced without a loss by a bias on
    the selection (Wang et al., arXiv 2408.15664). Other designs are settings: top-1 and top-2 with a balance
    loss, top-p, or no experts at all.

    Attributes:
        num_experts: E of every MoE layer; 0 or None makes the dense twin, the same network with MLPs of
            `intermediate_size`.
        num_experts_per_tok: K (the name that `transformers` uses; its `top_k` is for sampling).
        expert_hidden_dim: F of an expert.
        num_shared_experts: experts of that width which every token visits.
        first_dense_layers: layers, from the first, that keep a dense MLP of `intermediate_size`.
        capacity_factor: see `flexpert.MoEConfig`; None is dropless.
        router: name of a router or a dict of it and its options; see `flexpert.routers`.
        renormalize: see `flexpert.MoEConfig`.
        balance_loss: name of the balance loss; see `flexpert.losses`.
        balance_weight: its weight in the loss; 0 for none.
        balance_scope: "micro_batch", "sequence" or "global"; see `flexpert.losses`.
    """

    model_type = "flexpert_moe_lm"

    num_experts: int | None = 16
    num_experts_per_tok: int = 4
    expert_hidden_dim: int = 128
    num_shared_experts: int = 1
    first_dense_layers: int = 1
    capacity_factor: float | int | None = None
    router: str | dict[str, Any] = "linear"
    renormalize: bool | str = True
    balance_loss: str = "balance"
    balance_weight: float | int = 0.01
    balance_scope: str = "global"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.first_dense_layers <= self.num_hidden_layers:
            raise ConfigError(
                f"first_dense_layers={self.first_dense_layers}: expected 0..num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        if self.moe_layers():
            self.moe_layer().num_params()  # every part is asked here, not when the model is made

    def moe_layers(self) -> range:
        """Which layers have experts, counted from 0; none for the dense twin."""
        first = self.first_dense_layers if self.num_experts else self.num_hidden_layers
        return range(first, self.num_hidden_layers)

    def moe_layer(self) -> MoEConfig:
        """The MoE layer, the same in every place.

        Raises:
            ConfigError: a setting that no layer can have.
        """
        balance: Spec = self.balance_loss
        if self.balance_scope != "micro_batch":
            balance = {"name": self.balance_loss, "scope": self.balance_scope}
        return MoEConfig(
            model_dim=self.hidden_size,
            hidden_dim=self.expert_hidden_dim,
            num_experts=self.num_experts or 0,
            top_k=self.num_experts_per_tok,
            router=self.router,
            expert={"name": "glu", "init_std": self.initializer_range},
            activation=self.hidden_act,
            renormalize=self.renormalize,
            capacity_factor=self.capacity_factor,
            num_shared_experts=self.num_shared_experts,
            losses=(balance,),
        )


_TINY: dict[str, Any] = {
    "vocab_size": 256,  # bytes
    "bos_token_id": 0,
    "eos_token_id": None,
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "expert_hidden_dim": 128,
    "num_shared_experts": 1,
    "router": {"name": "linear", "scoring": "sigmoid", "selection_bias": True},
    "balance_weight": 0.0,
}
_PRESETS: dict[str, dict[str, Any]] = {"tiny": _TINY}


def language_preset(name: str, **overrides: Any) -> MoELanguageConfig:
    """A configuration by name.

    Args:
        name: "tiny": bytes, 4 layers of width 128, trains on a laptop's CPU in minutes. Its active MLP width,
            5 experts of 128, is that of its dense layers and of the dense twin, 640.
        overrides: settings of `MoELanguageConfig` in place of the preset's, such as `num_experts=0`.

    Raises:
        ConfigError: an unknown name or setting (the valid ones are listed), or a bad value.
    """
    return from_preset(MoELanguageConfig, _PRESETS, name, overrides)
