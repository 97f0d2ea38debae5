"""Models built on the meta device: which values they begin with, and where those are made.

The values follow from numbers that modules drew when they were built (experts, routers) and from one number
drawn here (other modules), and not from the number of ranks. One process gets the same ones by `materialize`.
A module that draws from the global generator when it is built, as `nn.Linear` does, has drawn nothing on the
meta device: what comes after it differs from a model built elsewhere with the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.core.errors import ConfigError
from flexpert.core.layout import ParamLayout
from flexpert.core.seeding import Initial, derive_seed, draw_base

from .mesh import ExpertMesh


@torch.no_grad()
def materialize(model: nn.Module, *, device: str | torch.device = "cpu") -> nn.Module:
    """Give a model built on the meta device its initial values, in place; other tensors stay as they are.

    For one process; `parallelize` does it for a model over ranks, where the values are the same.

    Args:
        model: its experts and routers know their values; other modules need `reset_parameters`.
        device: for the tensors.

    Returns:
        The model.

    Raises:
        ConfigError: a module that does not know its values; nothing has been changed then.
    """
    fill_dense(model, device, set())
    return model


@torch.no_grad()
def fill_dense(model: nn.Module, device: str | torch.device, later: set[Tensor]) -> None:
    """`materialize`, but for the parameters in `later`, which every rank makes its part of."""
    todo = {name: _meta_tensors(module, later) for name, module in model.named_modules()}
    todo = {name: tensors for name, tensors in todo.items() if tensors}
    if not todo:
        return
    for name, tensors in todo.items():
        _check_knows(name, model.get_submodule(name), tensors)
    base = draw_base()
    made: dict[Tensor, Tensor] = {}  # a tensor that several modules share stays one
    for name, tensors in todo.items():
        module = model.get_submodule(name)
        for key, old in tensors.items():
            if old not in made:
                made[old] = _unset(old)
            _put(module, key, made[old])
        initial = _initial(module)
        if not tensors.keys() <= initial.keys():
            _reset(module, derive_seed(base, name))
        for key in tensors.keys() & initial.keys():
            initial[key].fill(made[tensors[key]])
        for key, old in tensors.items():
            if _is_unset(made[old]):
                raise ConfigError(
                    f"{name}.{key}: reset_parameters of {type(module).__name__} gives it no value; build "
                    f"this module on a real device"
                )
            made[old].data = made[old].data.to(device)


def knows_initial(bank: nn.Module, name: str) -> bool:
    """Whether a bank's parameter can be made expert by expert."""
    return name in _initial(bank)


def initial_part(
    bank: nn.Module, name: str, shape: torch.Size, layout: ParamLayout, mesh: ExpertMesh, dtype: torch.dtype
) -> Tensor:
    """This rank's part of the initial value of a bank's parameter; one expert at a time is drawn whole."""
    parts = []
    for expert in mesh.experts_of(shape[0]):
        value = _initial(bank)[name].of_expert(expert, shape[1:])
        if layout.slice_dim is not None:
            value = value.chunk(mesh.slices, dim=layout.slice_dim - 1)[mesh.slice]
        parts.append(value.to(dtype))
    return torch.stack(parts).to(mesh.device_mesh.device_type)


def bases(model: nn.Module) -> list[tuple[str, str, int]]:
    """The numbers that the values of meta tensors follow from: equal on all ranks of one model."""
    return [
        (name, key, getattr(_initial(module)[key], "base", 0))
        for name, module in model.named_modules()
        for key in _meta_tensors(module, set())
        if key in _initial(module)
    ]


def _initial(module: nn.Module) -> Mapping[str, Initial]:
    found: Any = getattr(module, "initial", None)
    return found if isinstance(found, dict) else {}


def _meta_tensors(module: nn.Module, later: set[Tensor]) -> dict[str, Tensor]:
    own: Iterator[tuple[str, Tensor]] = module.named_parameters(recurse=False, remove_duplicate=False)
    found = {key: tensor for key, tensor in own if tensor.is_meta and tensor not in later}
    return found | {key: tensor for key, tensor in module.named_buffers(recurse=False) if tensor.is_meta}


def _check_knows(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    unknown = tensors.keys() - _initial(module).keys()
    if unknown and not callable(getattr(module, "reset_parameters", None)):
        raise ConfigError(
            f"{name} ({type(module).__name__}) is on the meta device and has no reset_parameters to give "
            f"{', '.join(sorted(unknown))} a value; build this module on a real device, or define it"
        )


def _reset(module: nn.Module, seed: int) -> None:
    """`reset_parameters`, drawing from the global generator as it is after `seed`."""
    reset: Any = module.reset_parameters
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        reset()
    finally:
        torch.random.set_rng_state(before)


def _unset(meta: Tensor) -> Tensor:
    """On the CPU, full of what no module begins with."""
    if meta.is_floating_point() or meta.is_complex():
        values = torch.full(meta.shape, float("nan"), dtype=meta.dtype, device="cpu")
    else:
        values = torch.zeros(meta.shape, dtype=meta.dtype, device="cpu")
    return nn.Parameter(values, meta.requires_grad) if isinstance(meta, nn.Parameter) else values


def _is_unset(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(key, tensor)
    else:
        module._buffers[key] = tensor
