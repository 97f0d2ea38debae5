"""What can be stored in a checkpoint, and what of one fits a module."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexpert.core.errors import CheckpointError, InputError

from .dcp_storage import describe

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"


def check_arguments(
    step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON], keep: int
) -> dict[str, str]:
    """Raise InputError for what cannot be stored; else `describe` of each tensor."""
    if step < 0 or keep < 1:
        raise InputError(f"step={step}, keep={keep}: step must be at least 0, keep at least 1")
    for name, tensor in tensors.items():
        plain = type(tensor) in {Tensor, nn.Parameter, DTensor} and tensor.layout is torch.strided
        if not plain or tensor.is_meta or tensor.is_quantized:
            raise InputError(
                f"tensors[{name!r}] is a {type(tensor).__name__} ({getattr(tensor, 'layout', 'no tensor')}, "
                f"{getattr(tensor, 'device', 'no device')}); give a dense torch.Tensor with values"
            )
    try:
        survived = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"state cannot be written as JSON: {error}") from error
    if survived != state:
        raise InputError(
            "state does not survive JSON unchanged; use string keys, and lists in place of tuples"
        )
    return {name: describe(tensor) for name, tensor in tensors.items()}


def merge_descriptions(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The tensors of all ranks. Raises InputError where ranks mean different ones by a name."""
    merged: dict[str, str] = {}
    for rank, part in enumerate(parts):
        for name, text in part.items():
            if merged.setdefault(name, text) != text:
                raise InputError(
                    f"tensors[{name!r}] is {merged[name]} on one rank and {text} on rank {rank}; give what "
                    f"differs between ranks a name for each rank, or make it a DTensor"
                )
    return merged


def strict_load(
    module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "", *, copy: bool = True
) -> None:
    """Copy the tensors whose names begin with `prefix` into `module`, all of them or none.

    For a DTensor of the module, a DTensor laid out as it is or the whole may be given. `copy=False` only
    checks.

    Raises CheckpointError, listing every name that is missing or unexpected and every tensor of another shape
    or dtype, before anything is copied.
    """
    given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    own = module.state_dict()
    faults = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "different": [
            f"{name} ({describe(given[name])} in the checkpoint, {describe(tensor)} in the module)"
            for name, tensor in own.items()
            if name in given and describe(given[name]) != describe(tensor)
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_shorten(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(
            f"the tensors '{prefix}*' do not fit {type(module).__name__}: {listed}; "
            "remedy: build the model with the configuration the checkpoint was written with"
        )
    if copy:
        module.load_state_dict(given)


def _shorten(names: Iterable[str], limit: int = 10) -> str:
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
