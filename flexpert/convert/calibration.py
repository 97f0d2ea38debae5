"""How active each hidden neuron of an MLP is on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.errors import ConfigError, InputError

from .reading import Place


@torch.no_grad()
def neuron_importance(model: nn.Module, places: Iterable[Place], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean absolute activation of each hidden neuron, fp64 (F,) on the CPU, by the MLP's name.

    Args:
        model: the dense model; it computes the batches in evaluation mode.
        places: of its MLPs.
        batches: each a mapping (the model's keyword arguments), a tuple or list (its arguments), or one
            value.

    Raises:
        ConfigError: there is no batch.
        InputError: an MLP saw no token.
    """
    places = list(places)
    totals: dict[str, Tensor] = {}
    tokens = dict.fromkeys((place.name for place in places), 0)

    def watch(name: str) -> Any:
        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            hidden_TF = arguments[0].detach().flatten(0, -2).abs()
            total = hidden_TF.sum(0, dtype=torch.float64).cpu()
            totals[name] = totals[name] + total if name in totals else total
            tokens[name] += len(hidden_TF)

        return add

    was_training = {module: module.training for module in model.modules()}
    handles = [model.get_submodule(p.last).register_forward_pre_hook(watch(p.name)) for p in places]
    try:
        model.eval()
        count = sum(_run(model, batch) for batch in batches)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    if not count:
        raise ConfigError("calibration has no batch; give some of the data that the model is for")
    if silent := [name for name, seen in tokens.items() if not seen]:
        raise InputError(f"no token reached {silent[0]} in the calibration; give batches that use it")
    return {name: total / tokens[name] for name, total in totals.items()}


def _run(model: nn.Module, batch: Any) -> int:
    """Compute a batch; 1, for counting."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
    return 1
