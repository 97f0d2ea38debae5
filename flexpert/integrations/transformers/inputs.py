"""Which of a model's tokens are real, from the arguments of its forward."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What a call of the model says about its tokens."""

    batch: int = 0
    length: int = 0
    mask_BS: Tensor | None = None

    @classmethod
    def of(
        cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], side: str = ""
    ) -> ModelInputs:
        """From the arguments of `model.forward`; "decoder_" for what the decoder of a pair reads."""
        given = dict(kwargs)
        if args:
            parameters = inspect.signature(model.forward).parameters
            given = {**dict(zip(parameters, args, strict=False)), **given}
        names = [f"{side}input_ids", f"{side}inputs_embeds", *(["labels"] if side else [])]
        tokens = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
        if tokens is None or tokens.dim() < 2:
            return cls()
        batch, length = tokens.shape[:2]
        mask = given.get(f"{side}attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return cls(batch=batch, length=length)
        if mask.shape[0] != batch or mask.shape[1] < length:
            return cls(batch=batch, length=length)
        return cls(batch=batch, length=length, mask_BS=mask[:, mask.shape[1] - length :].bool())

    def context(self, base: RoutingContext, tokens: int, device: torch.device) -> RoutingContext:
        """The context of a router's call on so many tokens: mask and length are those of the model's tokens.

        Raises:
            InputError: the base has a mask for another number of tokens.
        """
        mask, length = base.mask, base.sequence_length
        if mask is not None and mask.numel() != tokens:
            raise InputError(
                f"context.mask has {mask.numel()} values, and a router saw {tokens} tokens; give one for each"
            )
        if tokens > 0 and tokens == self.batch * self.length:
            mask = self.mask_BS if mask is None else mask
            length = length or self.length
        mask = None if mask is None else mask.reshape(-1).to(device)
        return dataclasses.replace(base, mask=mask, sequence_length=length)
