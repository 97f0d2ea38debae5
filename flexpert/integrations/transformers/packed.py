"""Inference weights of a model's experts in the layout that the kernels multiply by, in place of its own.

There is one copy of the weights at any time: the packed experts take the place of the module, whose own
weights are gone until `unpack(model)` or a `state_dict()` asks for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flexpert import ops
from flexpert.core.errors import ConfigError, InputError
from flexpert.ops import packing
from flexpert.ops.memory import prefer_huge_pages

from .blocks import experts_of
from .experts import regroup
from .layout import check_layout, first_name, fused_activation


class PackedExperts(nn.Module):
    """Stands where an experts module stood: the same call, the same `state_dict()`, inference alone.

    Args:
        experts: the module whose weights are packed; it is kept for its settings, without weights.
    """

    packed_w1: Tensor
    packed_w2: Tensor

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.first, activation = first_name(experts), fused_activation(experts)
        assert activation is not None
        self.activation = activation
        w1, w2 = getattr(experts, self.first), experts.down_proj
        self.num_experts, self.model_dim, self.hidden_dim = w1.shape[0], w1.shape[2], w2.shape[2]
        self.has_gate, self.output_dim = experts.has_gate, w2.shape[1]
        self._names = self.first, "down_proj"
        self._trainable = [getattr(experts, name).requires_grad for name in self._names]
        self._shell = [experts]  # in a list: not a child, or its training mode and state would be ours
        for name, bias in experts.named_parameters(recurse=False):
            if name not in self._names:
                self.register_parameter(name, bias)
        packed = packing.pack_mlp(self._halves(w1.detach()), w2.detach())
        for name, tiles in zip(("packed_w1", "packed_w2"), packed, strict=True):
            self.register_buffer(name, tiles, persistent=False)
        for name in self._names:
            experts._parameters[name] = None
        self.training = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As of the module that stood here.

        Raises:
            InputError: tokens of another dtype than the packed weights'.
        """
        w1, w2 = self.packed_w1, self.packed_w2
        if hidden_states.dtype is not w1.dtype:
            raise InputError(
                f"the experts' weights are packed in {w1.dtype}, and they got {hidden_states.dtype}; convert "
                f"the tokens, or call flexpert.integrations.transformers.unpack(model)"
            )
        if not torch.compiler.is_compiling():
            prefer_huge_pages(w1)
            prefer_huge_pages(w2)
        rows = regroup(top_k_index, top_k_weights, self.num_experts, hidden_states)
        b1, b2 = (getattr(self, f"{name}_bias", None) for name in self._names)
        b1 = None if b1 is None else self._halves(b1)
        sizes = self.hidden_dim, self.output_dim, self.activation
        return ops.grouped_mlp_packed(hidden_states, *rows, None, w1, b1, w2, b2, *sizes)

    def unpacked(self) -> Any:
        """The module that stood here, with its weights, bit for bit."""
        (experts,) = self._shell
        for name, weight, trains in zip(self._names, self._weights(), self._trainable, strict=True):
            experts._parameters[name] = nn.Parameter(weight, requires_grad=trains)
        return experts.eval()

    def train(self, mode: bool = True) -> PackedExperts:
        """As of every module; refused, as packed weights have no backward pass."""
        if mode:
            raise ConfigError(
                "packed weights cannot be trained; call flexpert.integrations.transformers.unpack(model) "
                "before"
            )
        return super().train(mode)

    def _halves(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (2, -1)) if self.has_gate else tensor

    def _weights(self) -> tuple[Tensor, Tensor]:
        w1, w2 = packing.unpack_mlp(
            self.packed_w1, self.packed_w2, self.model_dim, self.hidden_dim, self.output_dim
        )
        return w1.flatten(1, -2) if self.has_gate else w1, w2

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        remedy = "call flexpert.integrations.transformers.unpack(model) before"
        packing.check_conversion(self.packed_w1, fn, remedy)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, weight in zip(self._names, self._weights(), strict=True):
            destination[prefix + name] = weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = {name: state_dict.pop(prefix + name, None) for name in self._names}
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, own, index in zip(self._names, self._weights(), (0, 1), strict=True):
            weight, (missing, _, errors) = given[name], args[2:5]
            if weight is None:
                missing.append(prefix + name)
            elif weight.shape != own.shape:
                errors.append(f"{prefix}{name}: {tuple(weight.shape)} where {tuple(own.shape)} is packed")
            else:
                state_dict[prefix + name] = weight
                self._pack_one(index, weight.to(own.dtype))

    def _pack_one(self, index: int, weight: Tensor) -> None:
        weights = list(self._weights())
        weights[index] = weight
        packed = packing.pack_mlp(self._halves(weights[0]), weights[1])
        for own, tiles in zip((self.packed_w1, self.packed_w2), packed, strict=True):
            own.copy_(tiles)

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"E={self.num_experts}, D={self.model_dim}, F={self.hidden_dim}, {self.activation}, packed"


def prepack(model: nn.Module) -> dict[str, str | None]:
    """Pack the experts' weights of a model of transformers for inference in bf16, in place.

    Packed weights take the place of the model's own, layer by layer: at no time is there a second copy of
    more than one layer. Sizes that are no multiple of 32 are filled up with zeros. `state_dict()`,
    `load_state_dict()` and `save_pretrained` know the original names and bits (a state_dict is a copy then);
    `parameters()` no longer has these weights, and `unpack(model)` brings them back.

    Args:
        model: in eval mode.

    Returns:
        By the name of the experts module: None, or why it was left as it was.

    Raises:
        ConfigError: the model is in training mode, or has no routed experts.
    """
    if model.training:
        raise ConfigError(f"prepack({type(model).__name__}) in training mode; call eval() first")
    packed = {name: None for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    if packed:
        return dict(packed)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    result: dict[str, str | None] = {}
    for name, experts in experts_of(model).items():
        check_layout(experts, name)
        result[name] = why_not(experts, uses)
        if result[name] is None:
            model.set_submodule(name, PackedExperts(experts))
    return result


def why_not(experts: Any, uses: Counter[int]) -> str | None:
    """None where the weights of an experts module can be packed, else why not."""
    if fused_activation(experts) is None:
        return f"the layout, gate or activation of {type(experts).__name__} has no packed form"
    weights = {name: experts._parameters.get(name) for name in (first_name(experts), "down_proj")}
    for name, weight in weights.items():
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            return f"{name} is not a plain parameter"
        if uses[id(weight)] > 1:
            return f"{name} is shared with another module"
    return packing.why_not(experts.down_proj.device, experts.down_proj.dtype)


def unpack(model: nn.Module) -> None:
    """Undo `prepack`: the model's own modules and weights, bit for bit."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    for name, module in packed.items():
        model.set_submodule(name, module.unpacked())
