"""What all tests share."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from flexpert.train import data

# Tests run side by side, one process per core.
torch.set_num_threads(1)
# A first call may compile or import; how long one example takes says nothing.
hypothesis.settings.register_profile("flexpert", deadline=None)
hypothesis.settings.load_profile("flexpert")


@pytest.fixture
def tiny_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 60 + 20 random images that passes for the published files during one test."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "tiny-fashion-mnist"
    folder.mkdir()
    files = {}
    for name, count in (("train", 60), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", rng.integers(0, 10, count, dtype=np.uint8)),
        ):
            file = f"{name}-{kind}-ubyte"
            content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            (folder / f"{file}.gz").write_bytes(gzip.compress(content))
            files[file] = data.IdxFile(array.shape, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data, "FILES", files)
    return folder
