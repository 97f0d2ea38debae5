"""The state of a run as named tensors: weights, optimiser moments, random state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flexpert.core.errors import CheckpointError

from .checkpoint import strict_load

_MODEL, _OPTIMIZER, _RANDOM = "model.", "optimizer.", "random.torch"


def collect_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a step reads that an earlier one wrote; learning rate and batch follow from its number."""
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{_OPTIMIZER}{names[parameter]}.{key}"] = value
    tensors[_RANDOM] = torch.get_rng_state()
    return tensors


def restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `collect_state` took.

    Raises:
        CheckpointError: names or shapes that differ from this model's; nothing has been changed then.
    """
    moments = _moments(model, tensors)
    if _RANDOM not in tensors:
        raise CheckpointError("the checkpoint has no random state; it was not written by a training run")
    strict_load(model, tensors, _MODEL)
    for parameter, state in moments.items():
        optimizer.state[parameter] = state
    torch.set_rng_state(tensors[_RANDOM])


def _moments(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[nn.Parameter, dict[str, Tensor]]:
    parameters = dict(model.named_parameters())
    result: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(_OPTIMIZER):
            continue
        owner, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
        parameter = parameters.get(owner)
        if parameter is None or (tensor.dim() and tensor.shape != parameter.shape):
            raise CheckpointError(
                f"optimiser state {name!r} of shape {tuple(tensor.shape)} fits no parameter"
            )
        result.setdefault(parameter, {})[key] = tensor if not tensor.dim() else tensor.to(parameter.device)
    return result
