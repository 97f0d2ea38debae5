"""A dense feed-forward network as values: what every conversion starts from and ends in.

Letters: D model_dim, F hidden_dim, O output_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.core.errors import CheckpointError
from flexpert.ops.activations import get_activation


@dataclass(frozen=True, kw_only=True)
class DenseMLP:
    """y = act(x W1^T + b1) W2^T + b2, or with a gate (act(x Wg^T + bg) * (x Wu^T + bu)) W2^T + b2.

    Attributes:
        w1: (F, D); gated: (2, F, D), gate first.
        b1: (F,), (2, F) or None.
        w2: (O, F).
        b2: (O,) or None.
        activation: name; see `flexpert.ops.activations`.
        dropout: on the hidden layer, in training; a call here drops nothing.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str
    dropout: float = 0.0

    @property
    def gated(self) -> bool:
        """Whether it is a gated linear unit."""
        return self.w1.dim() == 3

    @property
    def model_dim(self) -> int:
        """D."""
        return self.w1.shape[-1]

    @property
    def hidden_dim(self) -> int:
        """F."""
        return self.w2.shape[1]

    @property
    def output_dim(self) -> int:
        """O."""
        return self.w2.shape[0]

    @property
    def expert_bias(self) -> bool | str:
        """Its biases, as `MoEConfig.expert_bias` says it."""
        if self.b1 is None:
            return False if self.b2 is None else "b2"
        return "b1" if self.b2 is None else True

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it has, by name."""
        every = {"w1": self.w1, "b1": self.b1, "w2": self.w2, "b2": self.b2}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> DenseMLP:
        """The network of another's tensors, by name as in `tensors()`."""
        b1, b2 = tensors.get("b1"), tensors.get("b2")
        return dataclasses.replace(self, w1=tensors["w1"], b1=b1, w2=tensors["w2"], b2=b2)

    def num_params(self) -> int:
        """Parameters."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def flops(self) -> int:
        """Floating-point operations of the matrix products per token, 2 per weight."""
        return 2 * (self.w1.numel() + self.w2.numel())

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (..., O) of tokens (..., D), in plain PyTorch."""
        hidden = F.linear(x, self.w1.flatten(0, -2), None if self.b1 is None else self.b1.flatten())
        act = get_activation(self.activation).forward
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return F.linear(act(gate) * up, self.w2, self.b2)
        return F.linear(act(hidden), self.w2, self.b2)

    def neurons(self, index: Tensor, bias_share: float = 1.0) -> DenseMLP:
        """The part made of some hidden neurons, with this share of the output bias."""
        return dataclasses.replace(
            self,
            w1=self.w1.index_select(-2, index),
            b1=None if self.b1 is None else self.b1.index_select(-1, index),
            w2=self.w2.index_select(1, index),
            b2=None if self.b2 is None else self.b2 * bias_share,
        )


def stack(parts: Sequence[DenseMLP]) -> dict[str, Tensor]:
    """The parameters of a bank whose experts are these."""
    return {name: torch.stack([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}


def join(parts: Sequence[DenseMLP]) -> DenseMLP:
    """The one network that computes the sum of these: hidden neurons side by side, output biases added."""
    first = parts[0]
    b1 = None if first.b1 is None else torch.cat([part.tensors()["b1"] for part in parts], dim=-1)
    b2 = None if first.b2 is None else torch.stack([part.tensors()["b2"] for part in parts]).sum(0)
    return dataclasses.replace(
        first,
        w1=torch.cat([part.w1 for part in parts], dim=-2),
        b1=b1,
        w2=torch.cat([part.w2 for part in parts], dim=1),
        b2=b2,
    )


def average(parts: Sequence[DenseMLP], shares: Sequence[float]) -> DenseMLP:
    """The network whose tensors are the weighted sum of those of equal networks."""
    first = parts[0]
    totals = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in first.tensors().items()}
    for share, part in zip(shares, parts, strict=True):
        for name, tensor in part.tensors().items():
            totals[name] += share * tensor.double()
    return first.with_tensors({name: total.to(first.w1.dtype) for name, total in totals.items()})


def is_linear(module: nn.Module) -> bool:
    """Whether it is `nn.Linear`, or the `Conv1D` of transformers, whose weight is the transpose."""
    return type(module) is nn.Linear or _is_transposed(module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module."""
    rows, columns = _parameters(module)[0].shape
    return (rows, columns) if _is_transposed(module) else (columns, rows)


def read_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (outputs, inputs) and bias, not copied."""
    weight, bias = _parameters(module)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return (weight.T if _is_transposed(module) else weight), bias


def write_linear(module: nn.Module, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """Give a linear module, which may be on the meta device, new parameters.

    Raises:
        CheckpointError: they have another shape.
    """
    weight = weight.T if _is_transposed(module) else weight
    old, old_bias = _parameters(module)
    if weight.shape != old.shape or (bias is None) != (old_bias is None):
        raise CheckpointError(
            f"{name} of the dense model has a weight {tuple(old.shape)} and "
            f"{'no' if old_bias is None else 'a'} bias, the experts make one of {tuple(weight.shape)} and "
            f"{'no' if bias is None else 'a'} bias; give the dense model that was converted"
        )
    module.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias.contiguous())


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight, as it is stored, and bias of a linear module."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return weight, bias


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
