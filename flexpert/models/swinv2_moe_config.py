"""The configuration of SwinV2-MoE and its presets.

SwinV2-MoE (Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", arXiv 2206.03382, section 5.3): a Swin
Transformer V2 (Liu et al., arXiv 2111.09883) in which a mixture of experts replaces the MLP of every second block
of the last two stages.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import Swinv2Config

from flexpert.core.config import MoEConfig
from flexpert.core.errors import ConfigError
from flexpert.core.registry import check_options, keyword_names, split_spec, suggest


@strict
class SwinV2MoEConfig(Swinv2Config):
    """A `Swinv2Config` and its MoE layers; the defaults are those of the published model.

    Attributes:
        num_experts: E of every MoE layer; 0 or None makes the dense twin, the same network without experts.
        top_k: K.
        capacity_factor: see `flexpert.MoEConfig`. Published: 1.25.
        router: "linear", "cosine", or a dict of a router and its options; see `flexpert.routers`.
        gate_noise: training noise on the logits; 0 for none. An option of that name in `router` wins.
        batch_prioritized: tokens of higher gate score take their places first.
        balance_loss: name of the balance loss; see `flexpert.losses`.
        balance_weight: its weight in the loss, after `balance_reduction`.
        balance_reduction: "mean" or "sum" over the MoE layers. The published code sums.
        moe_dropout: dropout between the two matrices of an expert.
        mlp_fc2_bias: the second matrix of every MLP, an expert's and a dense one's, has a bias. Published: no.
        expert_init_std: of the experts' weights; biases start at 0.
        moe_blocks: for each stage, the blocks that get experts, counted from 0; None for the odd blocks of the
            last two stages.
    """

    model_type = "swinv2_moe"

    num_experts: int | None = 32
    top_k: int = 1
    capacity_factor: float | int | None = 1.25
    router: str | dict[str, Any] = "linear"
    gate_noise: float | int = 1.0
    batch_prioritized: bool = True
    balance_loss: str = "importance_load"
    balance_weight: float | int = 0.01
    balance_reduction: str = "mean"
    moe_dropout: float | int = 0.1
    mlp_fc2_bias: bool = False
    expert_init_std: float = 0.005
    moe_blocks: list[list[int]] | tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.balance_reduction not in ("mean", "sum"):
            raise ConfigError(f"balance_reduction={self.balance_reduction!r}: expected 'mean' or 'sum'")
        if len(self.depths) != len(self.num_heads):
            raise ConfigError(f"depths={self.depths} and num_heads={self.num_heads} must name the same stages")
        for stage, _ in self.moe_places():
            self.moe_layer(stage)  # a setting that no layer can have is refused here, not at build

    def moe_places(self) -> list[tuple[int, int]]:
        """(stage, block) of every MoE layer, in the order of the network; none for the dense twin.

        Raises:
            ConfigError: `moe_blocks` names a stage or block there is not.
        """
        if not self.num_experts:
            return []
        depths = list(self.depths)
        if self.moe_blocks is None:
            last_two = range(max(len(depths) - 2, 0), len(depths))
            return [(stage, block) for stage in last_two for block in range(1, depths[stage], 2)]
        if len(self.moe_blocks) != len(depths):
            raise ConfigError(f"moe_blocks={self.moe_blocks} must have one list for each of the {len(depths)} stages")
        places = [(stage, block) for stage, blocks in enumerate(self.moe_blocks) for block in sorted(set(blocks))]
        for stage, block in places:
            if not 0 <= block < depths[stage]:
                raise ConfigError(f"moe_blocks: stage {stage} has blocks 0..{depths[stage] - 1}, not {block}")
        return places

    def moe_layer(self, stage: int) -> MoEConfig:
        """The MoE layer of a stage, counted from 0.

        Raises:
            ConfigError: a setting that no layer can have.
        """
        dim = int(self.embed_dim * 2**stage)
        expert: dict[str, Any] = {"name": "mlp", "init_std": self.expert_init_std}
        name, options = split_spec(self.router, "router")
        return MoEConfig(
            model_dim=dim,
            hidden_dim=int(self.mlp_ratio * dim),
            num_experts=self.num_experts or 0,
            top_k=self.top_k,
            router={"name": name, "gate_noise": self.gate_noise, **options},
            expert=expert,
            activation=self.hidden_act,
            expert_bias=True if self.mlp_fc2_bias else "b1",
            capacity_factor=self.capacity_factor,
            batch_prioritized=self.batch_prioritized,
            losses=(self.balance_loss,),
        )
