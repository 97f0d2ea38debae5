"""Tensors in folders of torch.distributed.checkpoint, whose pickled metadata is read without trust."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

# The public functions warn of a single process, and warnings cannot be kept quiet in a thread.
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.tensor import DTensor

from flexpert.core.errors import CheckpointError
from flexpert.parallel.calls import call_of
from flexpert.parallel.pending import failure
from flexpert.parallel.together import Ranks

Like = Callable[[str], "Tensor | None"]

METADATA_FILE = ".metadata"
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a name up in a table of layouts
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
} | {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write tensors into `folder`; this rank's files are on the disk at return.

    Each rank writes its parts of DTensors; what several ranks have, one of them writes, so that the bytes are
    dealt out evenly.

    Raises DistributedError if a rank is gone, else what failed on one of the ranks.
    """
    with _plain_errors(ranks if ranks.size > 1 else None):
        _save_state_dict(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_writer=_AnonymousWriter(folder),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group if ranks.size > 1 else None,
            no_dist=ranks.size == 1,
        )


def names_written(folder: Path, rank: int) -> list[str]:
    """The files that a rank has written; the first one's include the metadata of all."""
    own = [file.name for file in folder.glob(f"__{rank}_*")]
    return sorted([*own, METADATA_FILE] if rank == 0 else own)


def read_tensors(
    path: Path, described: Mapping[str, str], files: set[str], like: Like | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a folder onto the CPU, on this rank by itself.

    Args:
        path: the folder, its files already verified.
        described: `describe(tensor)` of each tensor that must be there, in the order of the result.
        files: names of the verified files; no other is opened.
        like: from a name to a tensor; where that is a DTensor of the same shape, only its parts are read and
            the result is laid out as it is. Where that is on the meta device nothing is read, and the result
            is on it too: another rank has it.

    Raises CheckpointError for metadata that holds anything but tensors so described, in these files.
    """
    try:
        reader = _RestrictedReader(path, files)
        metadata = reader.read_metadata().state_dict_metadata
        entries = {n: entry for n, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
        found = {name: _text(entry.properties.dtype, entry.size) for name, entry in entries.items()}
        if found != described or len(metadata) > len(entries):
            raise pickle.UnpicklingError("its tensors are not those of the manifest")
        tensors = {
            name: _empty(entries[name].size, entries[name].properties.dtype, like and like(name))
            for name in described
        }
        with _plain_errors(None):
            _load_state_dict(
                {name: tensor for name, tensor in tensors.items() if not tensor.is_meta},
                storage_reader=reader,
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
    except Exception as error:  # a made-up file may raise anything
        raise CheckpointError(f"{path / METADATA_FILE} is refused: {error}") from error
    return tensors


def _empty(shape: torch.Size, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    if isinstance(like, DTensor) and like.shape == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    elsewhere = like is not None and like.is_meta and len(shape) > 0  # scalars are read by all
    return torch.empty(shape, dtype=dtype, device="meta" if elsewhere else "cpu")


def describe(tensor: Tensor) -> str:
    """Dtype and shape of the whole, such as "float32[2, 3]"."""
    return _text(tensor.dtype, tensor.shape)


def _text(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


class _MetadataUnpickler(pickle.Unpickler):
    """Resolves the types of DCP's metadata and torch's dtypes, and so can call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no type of checkpoint metadata")


class _RestrictedReader(FileSystemReader):
    def __init__(self, path: Path, files: set[str]) -> None:
        super().__init__(path)
        self._folder = path
        self._files = files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if METADATA_FILE not in self._files:
            raise pickle.UnpicklingError("the manifest does not name it")
        with (self._folder / METADATA_FILE).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        self._check(metadata)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _check(self, metadata: Metadata) -> None:
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name!r} is no tensor")
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
                raise pickle.UnpicklingError(f"the pieces of {name!r} do not make up its size")
        for info in metadata.storage_data.values():
            if not isinstance(info, _StorageInfo) or info.relative_path not in self._files:
                raise pickle.UnpicklingError("it points to a file that the manifest does not name")
            if info.transform_descriptors:
                raise pickle.UnpicklingError(f"it asks for the transforms {info.transform_descriptors}")


class _AnonymousWriter(FileSystemWriter):
    """Keeps the folder's path on this machine out of the metadata."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


@contextmanager
def _plain_errors(ranks: Ranks | None) -> Iterator[None]:
    """Turn DCP's wrapper, which is no Exception and hides even a KeyboardInterrupt, into what it wraps."""
    try:
        yield
    except CheckpointException as wrapper:
        cause, _ = next(iter(wrapper.failures.values()))
        raise _origin(cause) from None
    except RuntimeError as error:
        if ranks is None:
            raise
        # What fails on a rank is told by the wrapper; here a collective did.
        what = f"checkpoint save: {call_of(error) or 'a collective'} failed, among {ranks.size} ranks"
        raise failure(what, error, ranks.heartbeat) from error


def _origin(error: BaseException) -> BaseException:
    """The OSError (a full disk) under which torch failed to close a file, or else the error itself."""
    below = error.__context__
    while below is not None and not isinstance(below, OSError):
        below = below.__context__
    return below or error
