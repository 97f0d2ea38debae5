"""SwinV2-MoE for image classification, on the Swin Transformer V2 of `transformers`.

The paper is named at `SwinV2MoEConfig`; what differs from the published code, at `SwinV2MoEModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.swinv2.modeling_swinv2 import (
    Swinv2ForImageClassification,
    Swinv2ImageClassifierOutput,
    Swinv2Model,
)

from flexpert.routers import LinearRouter

from .collecting import CollectingMoE, LossCollector, none_of
from .model_card import model_card
from .pretrained import MoEPreTrained
from .swinv2_moe_config import SwinV2MoEConfig, preset
from .weight_decay import no_weight_decay, parameter_groups

__all__ = [
    "SwinV2MoEConfig",
    "SwinV2MoEForImageClassification",
    "SwinV2MoEModel",
    "SwinV2MoEOutput",
    "no_weight_decay",
    "parameter_groups",
    "preset",
]


@dataclass
class SwinV2MoEOutput(Swinv2ImageClassifierOutput):
    """The usual output of a classifier, and `aux_loss`.

    Attributes:
        aux_loss: the balance loss of all MoE layers, weighted: what `loss` has besides the cross entropy.
            None for the dense twin, and in evaluation without labels.
    """

    aux_loss: Tensor | None = None


class SwinV2MoEModel(Swinv2Model):
    """Swin Transformer V2 with MoE layers in place of the MLPs that `SwinV2MoEConfig` names.

    Differences from the published code, which stands on an earlier form of the network: attention by cosine
    and normalisation after each part, as in SwinV2 (there: scaled dot products, normalisation before).
    A consequence for K = 1: the norm that follows removes the size of the gate's weight, so the router learns
    from the balance loss and, through the norm's epsilon, little from the task. With K > 1 it learns from
    both.
    """

    config_class = SwinV2MoEConfig

    def __init__(self, config: SwinV2MoEConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.collector = LossCollector()
        if not config.mlp_fc2_bias:
            places = [(stage, place) for stage, depth in enumerate(config.depths) for place in range(depth)]
            for stage, place in places:
                last = self.get_submodule(f"{_block(stage, place)}.output.dense")
                last.register_parameter("bias", None)
        for stage, place in config.moe_places():
            block = self.get_submodule(_block(stage, place))
            block.intermediate = moe = CollectingMoE(config.moe_layer(stage), self.collector)
            if isinstance(moe.router, LinearRouter):
                nn.init.normal_(moe.router.weight, std=config.moe_init_std)
            block.output = nn.Identity()
        self.post_init()


def _block(stage: int, place: int) -> str:
    return f"encoder.layers.{stage}.blocks.{place}"


class SwinV2MoEForImageClassification(MoEPreTrained, Swinv2ForImageClassification):
    """`SwinV2MoEModel`, the mean over the last stage's tokens, and a linear classifier.

    Use it as any model of `transformers`: `save_pretrained`, `from_pretrained` and the Auto classes work.
    Routing is changed for a call, without anything left behind, by a `flexpert.routing_scope` around it:
    `with routing_scope(model, context=RoutingContext(top_k=2, capacity_factor=0.5)): model(images)`.
    """

    config_class = SwinV2MoEConfig
    fresh_head = "classifier."
    swinv2: SwinV2MoEModel

    def __init__(self, config: SwinV2MoEConfig) -> None:
        super(Swinv2ForImageClassification, self).__init__(config)  # its own would build a dense backbone
        self.num_labels = config.num_labels
        self.swinv2 = SwinV2MoEModel(config)
        width = self.swinv2.num_features
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> SwinV2MoEOutput | tuple[Any, ...]:
        """Classify images.

        Args:
            pixel_values: (B, num_channels, height, width), floating point. B may be 0, for a rank of several
                that has no image but takes part in the others' exchange.
            labels: int64 (B,); without them there is no loss.
            return_dict: False for a tuple.
            options: see `transformers.Swinv2ForImageClassification`.

        Returns:
            Logits (B, num_labels), and with labels the loss: cross entropy plus `aux_loss`. Whoever computes
            another loss from the logits adds `aux_loss` to it. A surrounding `routing_scope` sees the same
            terms, unweighted; `weighted_balance_loss(scope.losses)` is then the same number.
        """
        collector = self.swinv2.collector
        collector.calls = [] if self.training or labels is not None else None
        collector.stand_in = pixel_values is not None and pixel_values.shape[0] == 0
        try:
            base = self._classify(pixel_values, labels, **options)
            terms = collector.terms()
        finally:
            collector.reset()
        return self.with_balance_loss(SwinV2MoEOutput(**base), terms, return_dict)

    def _classify(self, pixel_values: Tensor | None, labels: Tensor | None, **options: Any) -> dict[str, Any]:
        """The output without the balance loss; of an empty batch, which the backbone cannot compute, too."""
        if not self.swinv2.collector.stand_in:
            return super().forward(pixel_values=pixel_values, labels=labels, return_dict=True, **options)
        assert pixel_values is not None
        image = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        base = none_of(dict(super().forward(pixel_values=image, return_dict=True, **options)))
        return base if labels is None else {**base, "loss": base["logits"].sum()}

    def weighted_balance_loss(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The balance loss as it enters the loss.

        Args:
            losses: loss terms by name, each 1-D over the MoE layers, such as `routing_scope(...).losses`.
        """
        values = losses[self.config.balance_loss]
        total = values.sum() if self.config.balance_reduction == "sum" else values.mean()
        return self.config.balance_weight * total

    def card(self) -> str:
        """The text of the model card."""
        return model_card(self)


AutoConfig.register(SwinV2MoEConfig.model_type, SwinV2MoEConfig)
AutoModel.register(SwinV2MoEConfig, SwinV2MoEModel)
AutoModelForImageClassification.register(SwinV2MoEConfig, SwinV2MoEForImageClassification)
