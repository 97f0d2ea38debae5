"""Checkpoints of a training run: written whole or not at all, verified before anything in them is opened.

A checkpoint is a folder `step-<number>` with tensors in the format of torch.distributed.checkpoint, and a
`manifest.json` with everything else and the SHA-256 of every file. One process writes to a run's folder, or
the ranks of one process group together; the folder then lies on a disk that they share. A checkpoint may be
read by any number of ranks, whatever number wrote it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from flexpert.core.errors import CheckpointError, DistributedError
from flexpert.parallel.together import Ranks
from flexpert.train.checks import JSON, check_arguments, merge_descriptions
from flexpert.train.dcp_storage import Like, names_written, read_tensors, write_tensors
from flexpert.train.manifest import (
    hash_files,
    hash_manifest,
    read_manifest,
    sync_folder,
    verify_files,
    write_manifest,
)

_TEMPORARY = ".tmp-"
# `step-00000007.1` is step 7 saved once more: a save replaces nothing, so one rename publishes it.
_PUBLISHED = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given: the step, tensors and the JSON state.

    Tensors are on the CPU, but for those that `load_checkpoint` was asked to lay out.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, JSON],
    keep: int = 2,
    *,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `folder/step-<step>` so that it appears complete or, at a crash or kill, not at all.

    What killed saves left behind is removed before, checkpoints beyond the newest `keep` are removed after.
    Values, shapes and dtypes of tensors are kept bit for bit; strides, devices and sharing are not. `state`
    must survive JSON unchanged: string keys, lists in place of tuples, finite numbers.

    On several ranks all of them call it. Each writes its parts of DTensors; a plain tensor of a name that
    several ranks have is the same on all of them and written once. `state` is that of the first rank. The
    checkpoint is published when all ranks have written, and where one fails or dies, none is.

    Args:
        folder: of the run's checkpoints; on a disk that all ranks share.
        step: number of the checkpoint.
        tensors: by name; plain ones, or DTensors on meshes of these ranks.
        state: what else is to be kept.
        keep: number of checkpoints that stay.
        group: the ranks that save together; None for all, or for this process where there is no process
            group.

    Returns the new folder. Raises InputError for what cannot be stored, DistributedError for a rank that is
    gone, CheckpointError if the folder holds a later step or cannot be written to; the checkpoints there are
    then as they were.
    """
    folder, ranks = Path(folder), Ranks(group)
    described = merge_descriptions(ranks.together(lambda: check_arguments(step, tensors, state, keep)))
    return write_checkpoint(folder, step, tensors, state, keep, described=described, ranks=ranks)


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, JSON],
    keep: int,
    *,
    described: Mapping[str, str],
    ranks: Ranks,
) -> Path:
    """`save_checkpoint` after its checks; `described` has the tensors of all ranks."""
    name = ranks.first(lambda: _next_name(folder, step))
    temporary = folder / f"{_TEMPORARY}{name}"

    def publish(files: Iterable[Mapping[str, Any]]) -> None:
        merged = {name: entry for part in files for name, entry in part.items()}
        write_manifest(temporary, step, state, described, merged)
        temporary.rename(folder / name)
        sync_folder(folder)

    try:
        ranks.first(lambda: _make_room(folder, temporary))
        ranks.together(lambda: _check_shared(temporary))
        write_tensors(temporary, tensors, ranks)
        files = ranks.together(lambda: hash_files(temporary, names_written(temporary, ranks.rank)))
        ranks.first(lambda: publish(files))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, DistributedError):
            raise DistributedError(
                f"step {step} was not saved: {error}; resume from the last checkpoint in {folder}"
            ) from error
        raise CheckpointError(
            f"step {step} could not be written into {folder}: {error}; "
            "remedy: make room there or mend the permissions, then resume from the last checkpoint"
        ) from error
    if ranks.rank == 0:
        for old in _published(folder)[:-keep]:
            _remove(old)
    return folder / name


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint published in `folder`, not yet verified; None if there is none."""
    return next(reversed(_published(Path(folder))), None)


def load_checkpoint(
    path: Path, like: Like | None = None, *, group: dist.ProcessGroup | None = None
) -> Checkpoint:
    """Verify the manifest and the hash of every file, then read the checkpoint.

    On several ranks all of them call it. The files are dealt out over the ranks to be verified, each once,
    and no rank opens one before all of them have been found intact; where a rank fails, all raise.

    Args:
        path: of the checkpoint, `latest_checkpoint` for the newest.
        like: from a tensor's name to one that it is for, or None. Where that is a DTensor of the same shape,
            only this rank's part is read, and the result is a DTensor laid out in the same way (see
            `state.layout_of`); where it is on the meta device nothing is; all other tensors are read whole.
        group: the ranks that load together; None for all, or for this process where there is no process
            group. A rank that loads alone gives a group of its own.

    Raises CheckpointError, which names the file, the fault and the remedy, for anything but what
    `save_checkpoint` wrote; DistributedError for a rank that is gone. The metadata is unpickled by a list of
    allowed types, nothing else is unpickled.
    """
    path, ranks = Path(path), Ranks(group)
    remedy = _remedy(path)
    manifest: dict[str, Any] = {}

    def read() -> str:
        manifest.update(read_manifest(path, remedy))
        return hash_manifest(manifest)

    if len(set(ranks.together(read))) > 1:
        raise CheckpointError(
            f"the ranks find different checkpoints under {path}; remedy: use a disk that all ranks share"
        )
    files = manifest["files"]
    try:
        dealt = sorted(files, key=lambda name: (-files[name]["size"], name))[ranks.rank :: ranks.size]
        ranks.together(lambda: verify_files(path, {name: files[name] for name in dealt}))
        tensors: dict[str, Tensor] = {}
        ranks.together(lambda: tensors.update(read_tensors(path, manifest["tensors"], set(files), like)))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remedy: {remedy}") from error
    return Checkpoint(step=manifest["step"], tensors=tensors, state=manifest["state"])


def _next_name(folder: Path, step: int) -> str:
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
    return name


def _make_room(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left_over)
    temporary.mkdir()


def _check_shared(temporary: Path) -> None:
    if not temporary.is_dir():
        raise OSError(f"{temporary}, which the first rank has made, is not here: the disk is not shared")


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
