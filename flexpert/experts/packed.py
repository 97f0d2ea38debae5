"""Inference weights in the layout that the kernels multiply by, in place of the bank's parameters.

There is one copy of the weights at any time, so none that could be stale: packed, `w1` and `w2` are None, and
whoever wants them reads `state_dict()`, loads another one, or calls `unpack()`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flexpert import ops
from flexpert.core.errors import ConfigError, InputError
from flexpert.ops import packing
from flexpert.ops.memory import prefer_huge_pages

from .bank import ExpertBank, cast

Bank = TypeVar("Bank", bound="PackableBank")
_NAMES = ("w1", "w2")


class PackableBank(ExpertBank):
    """A bank with parameters `w1`, `w2`, `b1` and `b2` of `ops.grouped_mlp`, whose weights can be packed."""

    gated: bool
    hidden_dim: int
    activation: str
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    packed_w1: Tensor
    packed_w2: Tensor

    @property
    def is_packed(self) -> bool:
        """Whether the weights are packed: `w1` and `w2` are then None."""
        return self._parameters.get("w1", self) is None and self._parameters.get("w2", self) is None

    def prepack(self) -> str | None:
        """Put packed weights in the place of `w1` and `w2`, for inference; None, or why nothing was done.

        Forward alone works then. `state_dict()` and `load_state_dict()` know the original layout and names.
        What else holds the old parameters (an optimizer, another module) no longer reaches this bank.

        Raises:
            ConfigError: the bank is in training mode.
        """
        if self.is_packed:
            return None
        if self.training:
            raise ConfigError(f"{type(self).__name__}.prepack() in training mode; call eval() first")
        for name in _NAMES:
            if (reason := _why_not(self._parameters.get(name), name)) is not None:
                return reason
        w1, w2 = self.w1, self.w2
        self._trainable = w1.requires_grad, w2.requires_grad
        tiles = packing.pack_mlp(w1.detach(), w2.detach())
        for name, packed in zip(_NAMES, tiles, strict=True):
            self.register_buffer(f"packed_{name}", packed, persistent=False)
            self._parameters[name] = None
        return None

    def unpack(self) -> None:
        """Put ordinary parameters back, with the bits they had; nothing where they are not packed."""
        if not self.is_packed:
            return
        weights = self._unpacked()
        for name, weight, trains in zip(_NAMES, weights, self._trainable, strict=True):
            self._parameters[name] = nn.Parameter(weight, requires_grad=trains)
            delattr(self, f"packed_{name}")

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        sizes = self.model_dim, self.hidden_dim, self.output_dim
        return packing.unpack_mlp(self.packed_w1, self.packed_w2, *sizes)

    def _fused_packed(
        self, x_TD: Tensor, unit_N: Tensor, weight_N: Tensor | None, counts_E: Tensor, slot_E: Tensor | None
    ) -> Tensor:
        """`ops.grouped_mlp_packed` with the bank's weights."""
        dtype = self.packed_w1.dtype
        if x_TD.dtype != dtype:
            raise InputError(
                f"the experts' weights are packed in {dtype}, and they got {x_TD.dtype}; convert x or use "
                f"autocast, or call unpack() on the bank"
            )
        if not torch.compiler.is_compiling():
            prefer_huge_pages(self.packed_w1)
            prefer_huge_pages(self.packed_w2)
        return ops.grouped_mlp_packed(
            x_TD, unit_N, weight_N, counts_E, slot_E, self.packed_w1, cast(self.b1, dtype), self.packed_w2,
            cast(self.b2, dtype), self.hidden_dim, self.output_dim, self.activation,
        )  # fmt: skip

    def params_of_experts(self) -> list[int]:
        """Parameters of each expert."""
        packed = self.flops_of_experts()[0] // 2 if self.is_packed else 0
        return [count + packed for count in super().params_of_experts()]

    def train(self: Bank, mode: bool = True) -> Bank:
        """As of every module; refused for packed weights, which have no backward pass."""
        if mode and self.is_packed:
            raise ConfigError("packed weights cannot be trained; call unpack() on the bank or model first")
        return super().train(mode)

    def _apply(self: Bank, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bank:
        if self.is_packed:
            remedy = "call unpack() on the bank or the model, convert, and prepack() again"
            packing.check_conversion(self.packed_w1, fn, remedy)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.is_packed:
            for name, weight in zip(_NAMES, self._unpacked(), strict=True):
                destination[prefix + name] = weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_packed = self.is_packed
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)
        if was_packed and (reason := self.prepack()) is not None:
            errors = args[6] if len(args) > 6 else kwargs["error_msgs"]
            errors.append(f"the loaded weights cannot be packed again and are left unpacked: {reason}")


def _why_not(weight: Tensor | None, name: str) -> str | None:
    if weight is None:
        return f"{name} is not a parameter of its own"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"{name} is a {type(weight.data).__name__}, not a plain tensor"
    return packing.why_not(weight.device, weight.dtype)


def _banks(model: nn.Module) -> Iterator[tuple[str, PackableBank]]:
    for name, module in model.named_modules():
        if isinstance(module, PackableBank):
            yield name, module


def prepack(model: nn.Module) -> dict[str, str | None]:
    """Pack the weights of all MLP and GLU banks of a model, for inference in bf16; in place.

    Packed weights take the place of the parameters: `state_dict()`, `load_state_dict()` and `deepcopy` work
    as before, while `train()`, backward and other dtypes are refused until `unpack(model)`.

    Args:
        model: in eval mode.

    Returns:
        By the bank's name: None, or why it was left as it is (its dtype, this processor, shared weights).

    Raises:
        ConfigError: a bank is in training mode.
    """
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    result: dict[str, str | None] = {}
    for name, bank in _banks(model):
        shared = [own for own in _NAMES if uses[id(bank._parameters.get(own))] > 1]
        result[name] = f"{shared[0]} is shared with another module" if shared else bank.prepack()
    return result


def unpack(model: nn.Module) -> None:
    """Undo `prepack`: ordinary parameters, bit for bit those that were packed or loaded since."""
    for _, bank in _banks(model):
        bank.unpack()
