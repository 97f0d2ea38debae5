"""The manifest of a checkpoint folder: its contents in JSON, with the SHA-256 of every file and of itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flexpert.core.errors import CheckpointError

FORMAT = "flexpert-checkpoint"
VERSION = 1
MANIFEST_FILE = "manifest.json"
# From a version to the function that makes the next version's manifest of it. Version 1 is the first.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def write_manifest(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, str],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Describe `folder`; the manifest and the folder's entries are on the disk at return.

    Args:
        folder: holds the other files, already synchronised.
        step: the training step.
        state: what JSON can hold.
        tensors: dtype and shape of each, as text.
        files: `hash_files` of all files there.

    Raises CheckpointError if the folder holds other files than these.
    """
    if found := {file.name for file in folder.iterdir()} ^ files.keys():
        raise CheckpointError(f"{folder} does not hold what was written: {', '.join(sorted(found))}")
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "state": state}
    manifest |= {"tensors": tensors, "files": dict(sorted(files.items()))}
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump({**manifest, "sha256": hash_manifest(manifest)}, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """The verified manifest of `path` in the form of the present version.

    Raises CheckpointError, ending with `remedy`, if it is missing, damaged, foreign or of a newer format.
    """
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; remedy: {remedy}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}; remedy: {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is foreign: its format is not {FORMAT!r}; remedy: {remedy}")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, this Flexpert reads up to {VERSION}; remedy: update it"
        )
    if manifest.pop("sha256", None) != hash_manifest(manifest):
        raise CheckpointError(f"{file} is damaged: it does not have the SHA-256 it names; remedy: {remedy}")
    while version != VERSION:
        if version not in MIGRATIONS:
            raise CheckpointError(f"{file} has the unknown format version {version!r}; remedy: {remedy}")
        manifest = MIGRATIONS[version](manifest)
        version = manifest["version"]
    if not _has_fields(manifest):
        raise CheckpointError(f"{file} is foreign: a field is missing or of another type; remedy: {remedy}")
    return manifest


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files of a folder, as `write_manifest` wants them."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": _hash_file(folder / name)} for name in names
    }


def verify_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError for a file that is missing or not, byte for byte, what the manifest says."""
    for name, expected in files.items():
        file = path / name
        if file.parent != path or not file.is_file():
            raise CheckpointError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            fault = "truncated" if size < expected["size"] else "too long"
            raise CheckpointError(f"{file} is {fault}: {size} bytes, {expected['size']} were written")
        if _hash_file(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST_FILE}")


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own `sha256`, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the entries of a folder to the disk, so that renames in it outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _has_fields(manifest: Mapping[str, Any]) -> bool:
    fields = {"step": int, "state": dict, "tensors": dict, "files": dict}
    return all(isinstance(manifest.get(name), kind) for name, kind in fields.items()) and all(
        isinstance(entry, dict) and isinstance(entry.get("size"), int) and "sha256" in entry
        for entry in manifest["files"].values()
    )
