"""Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747): found on the machine or fetched, always verified.

Nothing is ever made up: without the published images there is an error that says what was tried.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import logging
import math
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flexpert.core.errors import CheckpointError, FlexpertError, InputError

logger = logging.getLogger(__name__)

VARIABLE = "FLEXPERT_FASHION_MNIST"
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_UBYTE = 8  # the idx type code of unsigned bytes
_STALE_SECONDS = 3600.0  # a fetch that began so long ago was killed


@dataclass(frozen=True)
class IdxFile:
    """What one of the four published files must hold; the SHA-256 is that of the content without gzip.

    Distributors pack the same content anew, so the packed bytes differ from place to place.
    """

    shape: tuple[int, ...]
    sha256: str


FILES = {
    "train-images-idx3-ubyte": IdxFile(
        (60000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte": IdxFile(
        (60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte": IdxFile(
        (10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte": IdxFile(
        (10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """Images (N, height, width) as uint8 and labels (N,) as int64, for training and for the test.

    `source` says where they came from, for the run's record.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    source: str


def cache_folder() -> Path:
    """The user's cache folder of Flexpert: $FLEXPERT_CACHE, $XDG_CACHE_HOME/flexpert or ~/.cache/flexpert."""
    if chosen := os.environ.get("FLEXPERT_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "flexpert"
    return Path.home() / ".cache" / "flexpert"


def load_fashion_mnist(folder: str | None = None) -> ImageDataset:
    """Load Fashion-MNIST: 60,000 training and 10,000 test images of 28x28, ten classes.

    A `folder`, or else the environment variable FLEXPERT_FASHION_MNIST, names the place, and no other is
    looked at. Without both: the system folder, the user's cache folder, the Debian package (fetched into the
    cache, not installed), the address of the data set's authors. Files may be gzipped or not.

    Raises CheckpointError for a missing, truncated, corrupt or foreign file, InputError when there is no
    source left.
    """
    if named := folder or os.environ.get(VARIABLE):
        origin = "the folder argument" if folder else f"${VARIABLE}"
        remedy = f"{origin} must name a folder with the four idx files of Fashion-MNIST; name another or none"
        return _read_folder(Path(named).expanduser(), source=f"{origin} ({named})", remedy=remedy)
    tried = []
    cached = cache_folder() / "fashion-mnist"
    for place, remedy in (
        (SYSTEM_FOLDER, f"install the package {DEBIAN_PACKAGE} anew, or set ${VARIABLE} to a good copy"),
        (cached, f"delete {cached} and run again: it is then fetched anew"),
    ):
        if place.is_dir():
            return _read_folder(place, source=str(place), remedy=remedy)
        tried.append(f"{place}: no such folder")
    for source, fetch in (
        (f"Debian package {DEBIAN_PACKAGE}", _fetch_debian_package),
        (URL, _fetch_url),
    ):
        logger.info("Fashion-MNIST: fetching 31 MB from %s into %s", source, cached)
        try:
            return _fetch_into(cached, source, fetch)
        except (FlexpertError, OSError, http.client.HTTPException, subprocess.SubprocessError) as error:
            tried.append(f"{source}: {error}")
    raise InputError(
        f"Fashion-MNIST is not on this machine and could not be fetched ({'; '.join(tried)}); remedy: connect"
        " to a network and run again; or, on Debian and its like, `sudo apt-get update` and `sudo apt-get "
        f"install {DEBIAN_PACKAGE}`; or put the four idx.gz files into a folder and set ${VARIABLE} to it"
    )


def read_idx(path: str | Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, gzipped or not, as an array of uint8 with the shape it declares.

    Raises CheckpointError for a file that is truncated, corrupt, too long or of another format.
    """
    return _parse_idx(_content(Path(path)), Path(path))


def _read_folder(folder: Path, *, source: str, remedy: str) -> ImageDataset:
    """Read and verify the four files; every error names the file and ends with the remedy."""
    try:
        arrays = {name: _read_published(folder, name) for name in FILES}
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remedy: {remedy}") from error
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return ImageDataset(
        train_images=tensors["train-images-idx3-ubyte"],
        train_labels=tensors["train-labels-idx1-ubyte"].long(),
        test_images=tensors["t10k-images-idx3-ubyte"],
        test_labels=tensors["t10k-labels-idx1-ubyte"].long(),
        source=source,
    )


def _read_published(folder: Path, name: str) -> np.ndarray:
    expected = FILES[name]
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds no {name}.gz")
    content = _content(path)
    array = _parse_idx(content, path)
    if array.shape != expected.shape:
        raise CheckpointError(f"{path} has the shape {array.shape}, Fashion-MNIST has {expected.shape}")
    found = hashlib.sha256(content).hexdigest()
    if found != expected.sha256:
        raise CheckpointError(
            f"{path} is not the published file: SHA-256 of its content {found}, expected {expected.sha256}"
        )
    return array


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error


def _parse_idx(content: bytes, path: Path) -> np.ndarray:
    """Parse two zero bytes, type code, number of axes, big-endian int32 sizes, then the bytes themselves."""
    if len(content) < 4 or content[:3] != bytes((0, 0, _UBYTE)):
        raise CheckpointError(f"{path} is not an idx file of unsigned bytes: it begins with {content[:4]!r}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise CheckpointError(f"{path} is truncated: its header ends after {len(content)} of {start} bytes")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    expected = start + math.prod(shape)
    if len(content) != expected:
        fault = "truncated" if len(content) < expected else "too long"
        raise CheckpointError(f"{path} is {fault}: {len(content)} bytes, its shape {shape} needs {expected}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _fetch_into(target: Path, source: str, fetch: Callable[[Path], None]) -> ImageDataset:
    """Fetch into a temporary folder beside `target`, verify, and publish by one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_over in target.parent.glob(".fetch-*"):
        with contextlib.suppress(OSError):  # another process may remove it as well
            if time.time() - left_over.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        fetch(folder)
        dataset = _read_folder(folder, source=source, remedy="try again later")
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    return dataset


def _fetch_debian_package(folder: Path) -> None:
    """Download the package as any user may and unpack it, installing nothing."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise InputError(f"{tool} is not on this machine")
    work = folder.parent.resolve()
    options = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20"]
    download = ["apt-get", "download", DEBIAN_PACKAGE]
    try:
        _run(download, work, options)
    except InputError as first:
        # The package lists may be absent or old, and only root may change them: take lists of our own.
        lists, archives = work / "lists", work / "apt"
        (lists / "partial").mkdir(parents=True)
        (archives / "archives" / "partial").mkdir(parents=True)
        options += ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={archives}"]
        try:
            _run(["apt-get", "update"], work, [*options, "-o", "Acquire::Languages=none"])
            _run(download, work, options)
        except InputError as second:
            raise InputError(f"{first}; with fresh package lists: {second}") from second
    package = next(work.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    _run(["dpkg-deb", "-x", package.name, "unpacked"], work)
    for name in FILES:
        packed = work / "unpacked" / SYSTEM_FOLDER.relative_to("/") / f"{name}.gz"
        packed.replace(folder / packed.name)


def _run(command: list[str], folder: Path, options: Sequence[str] = ()) -> None:
    result = subprocess.run(
        [*command, *options],
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("E:")] or ["no reason given"]
        raise InputError(f"`{' '.join(command)}` failed: {lines[-1]}")


def _fetch_url(folder: Path) -> None:
    for name in FILES:
        with (
            urllib.request.urlopen(f"{URL}/{name}.gz", timeout=20) as answer,
            (folder / f"{name}.gz").open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)
