"""Checkpoints of a training run: written whole or not at all, verified before anything in them is opened.

A checkpoint is a folder `step-<number>` with tensors in the format of torch.distributed.checkpoint, and a
`manifest.json` with everything else and the SHA-256 of every file. One process writes to a run's folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexpert.core.errors import CheckpointError, InputError
from flexpert.train.dcp_storage import describe, read_tensors, write_tensors
from flexpert.train.manifest import read_manifest, sync_folder, verify_files, write_manifest

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"

_TEMPORARY = ".tmp-"
# `step-00000007.1` is step 7 saved once more: a save replaces nothing, so one rename publishes it.
_PUBLISHED = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given: the step, tensors (on the CPU) and the JSON state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON], keep: int = 2
) -> Path:
    """Write `folder/step-<step>` so that it appears complete or, at a crash or kill, not at all.

    What killed saves left behind is removed before, checkpoints beyond the newest `keep` are removed after.
    Values, shapes and dtypes of tensors are kept bit for bit; strides, devices and sharing are not. `state`
    must survive JSON unchanged: string keys, lists in place of tuples, finite numbers.

    Returns the new folder. Raises InputError for what cannot be stored, CheckpointError if the folder holds a
    later step or cannot be written to; the checkpoints there are then as they were.
    """
    folder = Path(folder)
    _check_arguments(step, tensors, state, keep)
    name = f"step-{step:08d}"
    if newest := latest_checkpoint(folder):
        last_step, attempt = _order(newest)
        if last_step > step:
            raise CheckpointError(
                f"step={step} cannot be saved: {newest} is later, from another course of training; "
                "remedy: move it away, or use another folder"
            )
        if last_step == step:
            name += f".{attempt + 1}"
    temporary = folder / f"{_TEMPORARY}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left_over)
        temporary.mkdir()
        write_tensors(temporary, tensors)
        write_manifest(temporary, step, state, {key: describe(tensor) for key, tensor in tensors.items()})
        temporary.rename(folder / name)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"step {step} could not be written into {folder}: {error}; "
            "remedy: make room there or mend the permissions, then resume from the last checkpoint"
        ) from error
    for old in _published(folder)[:-keep]:
        _remove(old)
    return folder / name


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint published in `folder`, not yet verified; None if there is none."""
    return next(reversed(_published(Path(folder))), None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify the manifest and the hash of every file, then read the checkpoint.

    Raises CheckpointError, which names the file, the fault and the remedy, for anything but what
    `save_checkpoint` wrote. The metadata is unpickled by a list of allowed types, nothing else is unpickled.
    """
    path = Path(path)
    remedy = _remedy(path)
    manifest = read_manifest(path, remedy)
    try:
        verify_files(path, manifest["files"])
        tensors = read_tensors(path, manifest["tensors"], set(manifest["files"]))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remedy: {remedy}") from error
    return Checkpoint(step=manifest["step"], tensors=tensors, state=manifest["state"])


def strict_load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy the tensors whose names begin with `prefix` into `module`, all of them or none.

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
    module.load_state_dict(given)


def _check_arguments(step: int, tensors: Mapping[str, Tensor], state: Mapping[str, JSON], keep: int) -> None:
    if step < 0 or keep < 1:
        raise InputError(f"step={step}, keep={keep}: step must be at least 0, keep at least 1")
    for name, tensor in tensors.items():
        plain = type(tensor) in {Tensor, nn.Parameter} and tensor.layout is torch.strided
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


def _published(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _PUBLISHED.fullmatch(p.name)), key=_order)


def _order(path: Path) -> tuple[int, int]:
    """Step and attempt; a folder under a name of its own comes before all."""
    match = _PUBLISHED.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _remedy(path: Path) -> str:
    older = [other for other in _published(path.parent) if _order(other) < _order(path)]
    if older:
        return f"move {path} away and resume, which then goes on from the older {older[-1].name}"
    return "name a folder that holds an intact checkpoint, or start anew"


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves a temporary name, not half a checkpoint."""
    hidden = path.with_name(f"{_TEMPORARY}{path.name}")
    with suppress(OSError):  # the next save tries again
        path.rename(hidden)
        shutil.rmtree(hidden)


def _shorten(names: Iterable[str], limit: int = 10) -> str:
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
