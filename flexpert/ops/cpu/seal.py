"""A file that knows whether it is the one that was written: its last bytes are a checksum of the others.

The loader does not ask. It takes a library that a full disk or a crash cut short, and the process dies of it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_SIZE = hashlib.sha256().digest_size


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


def seal(path: Path, name: str) -> None:
    """Append the checksum; `name` is that of the file when it is read."""
    checksum = _checksum(name, path.read_bytes())
    with path.open("ab") as file:
        file.write(checksum)


def is_whole(path: Path) -> bool:
    """Whether there is such a file, under the name and with the content that it was sealed with."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-_SIZE:] == _checksum(path.name, content[:-_SIZE])
