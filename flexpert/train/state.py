"""The state of a run as named tensors: weights, optimiser moments, random state.

On several ranks each has its own random state, `random.torch.<rank>`. Read by the same number of ranks, each
gets its own back; by another number, each gets one that follows from the first one's and the place of the
rank, so that every resume of one checkpoint on that many ranks goes the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexpert.core.errors import CheckpointError
from flexpert.core.seeding import derive_seed
from flexpert.parallel.pieces import Pieces
from flexpert.parallel.state import distribute
from flexpert.parallel.together import Ranks

from .checkpoint import Checkpoint, load_checkpoint
from .checks import strict_load
from .dcp_storage import Like

_MODEL, _OPTIMIZER, _RANDOM = "model.", "optimizer.", "random.torch"


def collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Everything a step reads that an earlier one wrote; learning rate and batch follow from its number.

    Args:
        model: plain, or after `flexpert.parallel.parallelize`.
        optimizer: of its parameters.
        group: the ranks that save together; see `save_checkpoint`.
    """
    ranks, pieces = Ranks(group), Pieces(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts = dict(pieces.apart(name, tensor)) if pieces.within(name) else {name: tensor}
        tensors |= {f"{_MODEL}{part}": value for part, value in parts.items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            parts = _state_apart(pieces, names[parameter], parameter, value)
            tensors |= {f"{_OPTIMIZER}{part}.{key}": value for part, value in parts.items()}
    tensors[_random_name(ranks)] = torch.get_rng_state()
    return tensors


def restore_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Put back what `collect_state` took, on this or any other number of ranks.

    Args:
        model: as `collect_state` had it, laid out over ranks or not.
        optimizer: of its parameters.
        tensors: whole ones, or DTensors laid out as the model's.
        group: as in `collect_state`.

    Raises:
        CheckpointError: names or shapes that differ from this model's; nothing has been changed then, on any
            rank.
    """
    ranks, given = Ranks(group), tensors
    moments: dict[nn.Parameter, dict[str, Tensor]] = {}
    random: list[Tensor] = []

    def check() -> None:
        nonlocal tensors
        tensors = _joined(model, given)
        moments.update(_moments(model, tensors))
        random.append(_random_state(tensors, ranks))
        strict_load(model, tensors, _MODEL, copy=False)

    ranks.together(check)
    strict_load(model, tensors, _MODEL)
    for parameter, state in moments.items():
        optimizer.state[parameter] = state
    torch.set_rng_state(random[0])


def restore_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    group: dist.ProcessGroup | None = None,
) -> Checkpoint:
    """Load a checkpoint into a model and its optimiser; each rank reads its parts alone.

    Args:
        path: of the checkpoint, written by any number of ranks.
        model: plain, or after `flexpert.parallel.parallelize`.
        optimizer: of its parameters.
        group: the ranks that load together; see `load_checkpoint`.

    Raises:
        CheckpointError: it is damaged, foreign or of another model; nothing has been changed then.
        DistributedError: a rank is gone.
    """
    checkpoint = load_checkpoint(path, layout_of(model), group=group)
    restore_state(model, optimizer, checkpoint.tensors, group=group)
    return checkpoint


def layout_of(model: nn.Module) -> Like:
    """From the names of `collect_state` to the model's tensors, for `load_checkpoint`.

    Those of unlike experts that other ranks hold are on the meta device.
    """
    own, pieces = model.state_dict(), Pieces(model)
    elsewhere = torch.empty(0, device="meta")
    own |= dict.fromkeys(pieces.places, elsewhere)
    for name in [name for name in own if pieces.within(name)]:
        own |= dict(pieces.apart(name, own.pop(name)))

    def like(name: str) -> Tensor | None:
        if name.startswith(_OPTIMIZER):
            name = _MODEL + name.removeprefix(_OPTIMIZER).rpartition(".")[0]
        return own.get(name.removeprefix(_MODEL)) if name.startswith(_MODEL) else None

    return like


def _state_apart(pieces: Pieces, name: str, parameter: Tensor, value: Tensor) -> dict[str, Tensor]:
    """The state of a parameter by name; of one that unlike experts share, that of each of them."""
    if not pieces.within(name):
        return {name: value}
    parts = dict(pieces.apart(name, parameter))
    first = {pieces.places[part]: part for part in reversed(parts)}  # tied ones have one state
    if not value.dim():
        return {part: value.clone() for part in first.values()}
    own = dict(pieces.apart(name, value))
    return {part: own[part] for part in first.values()}


def _joined(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors with those of unlike experts put together as this model has them."""
    pieces, own, result = Pieces(model), model.state_dict(), dict(tensors)
    for stacked in [name for name in own if pieces.within(name)]:
        names = [name for name in pieces.within(stacked) if _MODEL + name in result]
        given = {name: result.pop(_MODEL + name) for name in names}
        result[_MODEL + stacked] = pieces.join(stacked, own[stacked], given)
    states: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name in [name for name in result if name.startswith(_OPTIMIZER)]:
        owner, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
        if owner in pieces.places:
            states.setdefault((pieces.places[owner].stacked, key), {})[owner] = result.pop(name)
    for (stacked, key), values in states.items():
        joined = _state_joined(pieces, stacked, own[stacked], key, values)
        result[f"{_OPTIMIZER}{stacked}.{key}"] = joined
    return result


def _state_joined(pieces: Pieces, stacked: str, like: Tensor, key: str, values: dict[str, Tensor]) -> Tensor:
    shapes = {name: pieces.places[name].shape for name in values}
    if key == "step" or any(not value.dim() and shapes[name] for name, value in values.items()):
        if len({float(value) for value in values.values()}) > 1:
            raise CheckpointError(
                f"the optimiser's {key!r} differs between the experts in {stacked}, which have one here: "
                f"some had no rows in steps of an older version; go on without ranks, or without moments"
            )
        return next(iter(values.values()))
    by_place = {pieces.places[name]: value for name, value in values.items()}
    every = {
        name: by_place[pieces.places[name]]
        for name in pieces.within(stacked)
        if pieces.places[name] in by_place
    }
    return pieces.join(stacked, like, every)


def _moments(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[nn.Parameter, dict[str, Tensor]]:
    model.state_dict()  # FSDP puts its sharded parameters back
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
        result.setdefault(parameter, {})[key] = tensor if not tensor.dim() else _as(tensor, parameter)
    return result


def _as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device and laid out as it is."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        return distribute(tensor, parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def _random_name(ranks: Ranks) -> str:
    return _RANDOM if ranks.size == 1 else f"{_RANDOM}.{ranks.rank}"


def _random_state(tensors: Mapping[str, Tensor], ranks: Ranks) -> Tensor:
    """The state that this rank goes on with."""
    first = tensors.get(_RANDOM, tensors.get(f"{_RANDOM}.0"))
    if first is None:
        raise CheckpointError("the checkpoint has no random state; it was not written by a training run")
    writers = sum(name == _RANDOM or name.startswith(f"{_RANDOM}.") for name in tensors)
    if writers == ranks.size:
        return tensors[_random_name(ranks)]
    digest = hashlib.sha256(first.numpy().tobytes()).digest()
    seed = derive_seed(int.from_bytes(digest[:8], "little"), "rank", ranks.rank, "of", ranks.size)
    return torch.Generator().manual_seed(seed).get_state()
