"""Files that a command is about to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import ConfigError


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is computed for it.

    Raises:
        ConfigError: it is a folder, its folder is missing, closed to this user or takes no files, or it is
            closed itself.
    """
    folder = path.parent
    if path.is_dir():
        raise ConfigError(f"{path}: it is a folder; name a file in it")
    if not folder.is_dir():
        raise ConfigError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigError(f"{path}: this user may not write there; name another file")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # a full disk; a folder such as /proc
    except OSError as error:
        raise ConfigError(f"{path}: no file can be made there ({error.strerror}); name another") from None
