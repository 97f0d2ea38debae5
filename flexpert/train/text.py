"""Text as bytes: the interpreter's own standard library, which every machine has, or another folder."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexpert.core.errors import InputError
from flexpert.core.seeding import derive_seed

SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst")
SEPARATOR = b"\0"  # before each file; no text has it
# Of the standard library: what is not its own, and tests, whose text is repetitive.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_HELD_OUT = 20  # one file in so many


@dataclass(frozen=True, kw_only=True)
class TextDataset:
    """Bytes as uint8, (N,): for training, and of other files for validation.

    `source` says where they came from, for the run's record.
    """

    train: Tensor
    valid: Tensor
    source: str


def load_python_source(folder: str | None = None) -> TextDataset:
    """All Python source of the running interpreter's standard library without its tests, about 11 MB.

    Which files are held out follows from their names, so it is the same for every run of one interpreter.

    Args:
        folder: of text files (.py, .pyi, .txt, .md, .rst, at any depth) in place of the standard library.

    Raises:
        InputError: no such folder, or too little text in it.
    """
    if folder is None:
        suffixes: tuple[str, ...] = SUFFIXES[:1]
        root = Path(sysconfig.get_path("stdlib"))
        source = f"the standard library of Python {platform.python_version()}"
    else:
        root, suffixes, source = Path(folder).expanduser(), SUFFIXES, folder
    if not root.is_dir():
        raise InputError(f"data.folder={folder!r} is no folder; name one with text files, or leave it out")
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in _files(root, suffixes):
        name = path.relative_to(root).as_posix()
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _HELD_OUT == 0
        parts[held_out].append(SEPARATOR + path.read_bytes().replace(SEPARATOR, b""))
    count = sum(map(len, parts.values()))
    train, valid = (b"".join(parts[held_out]) for held_out in (False, True))
    if not train or not valid:
        raise InputError(
            f"{root} has {count} files ({', '.join(suffixes)}) with {len(train)} bytes to train on and "
            f"{len(valid)} held out (one file in {_HELD_OUT}, by the hash of its name); add more files"
        )
    return TextDataset(train=_tensor(train), valid=_tensor(valid), source=f"{source} ({count} files)")


class TextBatches:
    """Windows of a text as a function of (seed, step): a resumed run sees what the uninterrupted one would.

    An epoch cuts the text into windows from a place drawn for it, and takes them in an order drawn for it.

    Args:
        text: uint8 (N,).
        length: L, bytes that a model predicts of each window; a window has one more.
        batch_size: windows in a training batch.
        seed: of places and order.

    Raises:
        InputError: a text shorter than one batch.
    """

    def __init__(self, text: Tensor, *, length: int, batch_size: int, seed: int) -> None:
        self.text, self.length, self.batch_size, self.seed = text, length, batch_size, seed
        self.windows = (len(text) - 1) // length - 1  # one less, so that they may begin anywhere
        self.steps_per_epoch = self.windows // batch_size
        if self.steps_per_epoch < 1:
            raise InputError(
                f"the text has {len(text)} bytes, a batch of {batch_size} windows of {length} needs "
                f"{(batch_size + 1) * length + 1}; lower optimizer.batch_size or data.sequence_length"
            )
        self._epoch, self._starts = -1, torch.empty(0, dtype=torch.int64)

    def train(self, step: int, samples: tuple[int, int] | None = None) -> Tensor:
        """The windows of a training step: int64 (B, L + 1).

        Args:
            step: of the run.
            samples: (first, end) of those of the batch to return; None for all.
        """
        first, end = (0, self.batch_size) if samples is None else samples
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            offset = torch.randint(self.length, (), generator=generator)
            order = torch.randperm(self.windows, generator=generator)
            self._epoch, self._starts = epoch, offset + order * self.length
        starts = self._starts[place * self.batch_size : (place + 1) * self.batch_size][first:end]
        return windows_at(self.text, starts, self.length)


def windows_at(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """int64 (B, length + 1): the bytes from each start on."""
    return text[starts[:, None] + torch.arange(length + 1)].long()


def _files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root).parts
        if path.suffix in suffixes and path.is_file() and not _LEFT_OUT.intersection(inner[:-1]):
            yield path


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
