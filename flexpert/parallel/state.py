"""Parameters of a model over many ranks as those of one process: out whole, in by parts.

Names, shapes and the order of experts are those of the unparallelised model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flexpert.core.errors import CheckpointError

from .heartbeat import heartbeat_of
from .pending import failure
from .pieces import Pieces
from .together import Ranks

Source: TypeAlias = Mapping[str, Tensor] | str | os.PathLike[str]
_Read: TypeAlias = Callable[[str, tuple[slice, ...] | None], Tensor]


@torch.no_grad()
def full_state_dict(model: nn.Module, *, rank: int = 0) -> dict[str, Tensor]:
    """The state dict of the unparallelised model, on the CPU of one rank.

    Every rank calls it. Tensors are put together one after the other, so that a rank needs room for the
    largest of them, and the one that gets the result room for all. The result shares no memory with the
    model: `safetensors.torch.save_file(full_state_dict(model), path)` on that rank writes the model as one
    process would.

    Args:
        model: after `parallelize`, or any model.
        rank: the global rank that gets the result; in a model that is not distributed, each process.

    Returns:
        Tensors by name; on the other ranks an empty dict.

    Raises:
        DistributedError: a rank is gone or too late.
    """
    own, pieces = _tensors(model), Pieces(model)
    result: dict[str, Tensor] = {}
    for name, tensor in own.items():
        whole = _whole(name, tensor) if isinstance(tensor, DTensor) else tensor
        if not dist.is_initialized() or dist.get_rank() == rank:
            parts = dict(pieces.apart(name, whole)) or {name: whole}
            result |= {key: part.to("cpu", copy=True).contiguous() for key, part in parts.items()}
    return {name: result[name] for name in pieces.original_names(own)} if result else {}


@torch.no_grad()
def load_full_state_dict(model: nn.Module, source: Source, *, group: dist.ProcessGroup | None = None) -> None:
    """Copy the state dict of an unparallelised model into a model over ranks: each rank takes its part.

    Every rank calls it. Values are converted to the model's dtypes.

    Args:
        model: after `parallelize`, or any model.
        source: tensors by name, on every rank; or a safetensors file that every rank can read, of which each
            reads only what it holds.
        group: the ranks that call; None for all.

    Raises:
        CheckpointError: a file that cannot be read; names that are missing or unknown, or other shapes, all
            of them listed. Nothing was copied then, on any rank.
    """
    ranks, own, pieces = Ranks(group), _tensors(model), Pieces(model)
    wanted = {
        name: tuple(pieces.places[name].shape if name in pieces.places else own[name].shape)
        for name in pieces.original_names(own)
    }
    with _open(source, ranks) as (shapes, read):
        ranks.together(lambda: _check(type(model).__name__, wanted, shapes))
        for name, tensor in own.items():
            if pieces.within(name):
                for key, part in pieces.apart(name, tensor):
                    part.copy_(read(key, None))
            elif isinstance(tensor, DTensor):
                _, index = local_part_of(tensor.shape, tensor.device_mesh, tensor.placements)
                tensor.to_local().copy_(read(name, index))
            else:
                tensor.copy_(read(name, None))


def local_part_of(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """The shape of this rank's part of a tensor, and where in the whole it lies."""
    local, offsets = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    places = zip(offsets, local, strict=True)
    return tuple(local), tuple(slice(start, start + size) for start, size in places)


def distribute(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of a tensor that every rank has; nothing is sent, and memory is this rank's own."""
    _, index = local_part_of(whole.shape, mesh, placements)
    part = whole.detach()[index].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=whole.shape, stride=_strides(whole.shape)
    )


def accept_full_tensors(model: nn.Module) -> None:
    """Let `load_state_dict` of a model over ranks, and of its modules, take tensors of one process too."""
    for module in model.modules():
        cut = {
            name: (tensor.device_mesh, tensor.placements)
            for name, tensor in [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            if isinstance(tensor, DTensor)
        }
        if cut:
            module.register_load_state_dict_pre_hook(_TakeParts(cut, Pieces(module)))


class _TakeParts:
    """A hook that puts this rank's part in place of each whole tensor that is given for a DTensor."""

    def __init__(self, cut: Mapping[str, tuple[DeviceMesh, Sequence[Placement]]], pieces: Pieces) -> None:
        self._cut, self._pieces = cut, pieces

    def __deepcopy__(self, memo: dict[int, Any]) -> _TakeParts:
        """Itself: meshes are shared, not copied."""
        return self

    def __call__(self, module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, (mesh, placements) in self._cut.items():
            whole = {
                key: tensors[prefix + key] for key in self._pieces.within(name) if prefix + key in tensors
            }
            if whole:
                tensors[prefix + name] = self._pieces.join(name, getattr(module, name), whole)
                for key in whole:
                    del tensors[prefix + key]
                continue
            given = tensors.get(prefix + name)
            # Another shape is left for the check that tells both.
            if isinstance(given, Tensor) and not isinstance(given, DTensor):
                own = getattr(module, name)
                if given.shape == own.shape:
                    tensors[prefix + name] = distribute(given, mesh, placements)


def _whole(name: str, tensor: DTensor) -> Tensor:
    try:
        return tensor.full_tensor()
    except RuntimeError as error:
        ranks = tuple(tensor.device_mesh.mesh.flatten().tolist())
        what = f"full_state_dict: all_gather of {name} on ranks {ranks} failed"
        raise failure(what, error, heartbeat_of(ranks)) from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def _check(model: str, own: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    faults = {
        "missing": sorted(own.keys() - shapes.keys()),
        "unknown": sorted(shapes.keys() - own.keys()),
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in own.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(
            f"the tensors do not fit {model}: {listed}; "
            "build the model with the configuration it was saved with"
        )


@contextmanager
def _open(source: Source, ranks: Ranks) -> Iterator[tuple[dict[str, tuple[int, ...]], _Read]]:
    """The shapes of the tensors in a source, and how to read one or a part of it."""
    if isinstance(source, Mapping):
        tensors = source
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        yield shapes, lambda name, index: tensors[name] if index is None else tensors[name][index]
        return
    from safetensors import SafetensorError, safe_open

    path = Path(source)

    def open_file() -> tuple[Any, dict[str, tuple[int, ...]]]:
        try:
            file = safe_open(path, framework="pt")
            return file, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error

    opened: list[tuple[Any, dict[str, tuple[int, ...]]]] = []
    ranks.together(lambda: opened.append(open_file()))
    file, shapes = opened[0]

    def read(name: str, index: tuple[slice, ...] | None) -> Tensor:
        if not index:
            return file.get_tensor(name)
        if any(place.start == place.stop for place in index):
            return torch.empty([place.stop - place.start for place in index])
        return file.get_slice(name)[index]

    with file:
        yield shapes, read
