"""The configuration of SwinV2-MoE and its presets.

SwinV2-MoE (Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", arXiv 2206.03382, section 5.3): a
Swin Transformer V2 (Liu et al., arXiv 2111.09883) in which a mixture of experts replaces the MLP of every
second block of the last two stages.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Swinv2Config

from flexpert.core.config import MoEConfig
from flexpert.core.errors import ConfigError
from flexpert.core.registry import Spec, split_spec
from flexpert.losses import build_losses

from .presets import from_preset


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
        balance_scope: "micro_batch", each rank's own tokens, as published; or "global", those of all ranks,
            which makes the loss the same on any number of them; see `flexpert.losses`.
        moe_dropout: dropout between the two matrices of an expert.
        mlp_fc2_bias: the second matrix of every MLP, dense or an expert, has a bias. Published: no.
        moe_init_std: of the weights of experts and linear routers; biases start at 0. Published: 0.005 for
            these and, in MoE models, for the dense matrices too (here: `initializer_range`).
        moe_blocks: for each stage, the blocks that get experts, counted from 0; None for the odd blocks of
            the last two stages.
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
    balance_scope: str = "micro_batch"
    moe_dropout: float | int = 0.1
    mlp_fc2_bias: bool = False
    moe_init_std: float = 0.005
    moe_blocks: list[list[int]] | tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.balance_reduction not in ("mean", "sum"):
            raise ConfigError(f"balance_reduction={self.balance_reduction!r}: expected 'mean' or 'sum'")
        if len(self.depths) != len(self.num_heads):
            raise ConfigError(f"depths={self.depths} and num_heads={self.num_heads} differ in length")
        for stage, _ in self.moe_places():
            self._check(self.moe_layer(stage))  # here, not when the first batch comes

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
            raise ConfigError(
                f"moe_blocks={self.moe_blocks}: expected a list for each of {len(depths)} stages"
            )
        places = [(stage, block) for stage, blocks in enumerate(self.moe_blocks) for block in sorted(blocks)]
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
        expert: dict[str, Any] = {"name": "mlp", "init_std": self.moe_init_std}
        if self.moe_dropout:
            expert |= {"name": "mlp_dropout", "dropout": self.moe_dropout}
        name, options = split_spec(self.router, "router")
        if self.gate_noise:
            options = {"gate_noise": self.gate_noise, **options}
        balance: Spec = self.balance_loss
        if self.balance_scope != "micro_batch":
            balance = {"name": self.balance_loss, "scope": self.balance_scope}
        return MoEConfig(
            model_dim=dim,
            hidden_dim=int(self.mlp_ratio * dim),
            num_experts=self.num_experts or 0,
            top_k=self.top_k,
            router={"name": name, **options},
            expert=expert,
            activation=self.hidden_act,
            expert_bias=True if self.mlp_fc2_bias else "b1",
            capacity_factor=self.capacity_factor,
            batch_prioritized=self.batch_prioritized,
            losses=(balance,),
        )

    def _check(self, layer: MoEConfig) -> None:
        build_losses(layer)
        _, options = split_spec(layer.router, "router")
        noisy = options.get("gate_noise") or options.get("learned_noise")
        if self.balance_loss == "importance_load" and not noisy:
            raise ConfigError(
                "balance_loss='importance_load' is defined by the gate noise: set gate_noise > 0, or "
                "balance_loss='balance'"
            )


_PUBLISHED: dict[str, Any] = {
    "image_size": 192,
    "window_size": 12,
    "depths": (2, 2, 18, 2),
    "num_labels": 21841,
    "balance_reduction": "sum",
}
_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 32,
        "patch_size": 4,
        "num_channels": 1,
        "window_size": 4,
        "embed_dim": 32,
        "depths": (1, 2, 2),
        "num_heads": (1, 2, 4),
        "pretrained_window_sizes": (0, 0, 0),
        "drop_path_rate": 0.0,
        "num_labels": 10,
        "num_experts": 8,
        "moe_dropout": 0.0,
        "balance_scope": "global",
    },
    "small": {**_PUBLISHED, "embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "base": {**_PUBLISHED, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3},
}


def preset(name: str, **overrides: Any) -> SwinV2MoEConfig:
    """A configuration by name.

    Args:
        name: "tiny": 32x32 images, trains on a laptop's CPU; "small", "base": the shapes of the paper
            (192x192 images, 21,841 classes, 32 experts).
        overrides: settings of `SwinV2MoEConfig` in place of the preset's, such as `num_experts=0`.

    Raises:
        ConfigError: an unknown name or setting (the valid ones are listed), or a bad value.
    """
    labels = "num_labels", "id2label", "label2id"
    return from_preset(SwinV2MoEConfig, _PRESETS, name, overrides, labels)
