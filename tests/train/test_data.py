from __future__ import annotations

import functools
import gzip
import http.server
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from flexpert.core.errors import CheckpointError, InputError
from flexpert.train import data
from flexpert.train.data import load_fashion_mnist, read_idx

FETCH_URL = data._fetch_url


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data set on this machine and none to be fetched; returns the cache folder."""

    def refuse(folder: Path) -> None:
        raise InputError("not in tests")

    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr(data, "_fetch_debian_package", refuse)
    monkeypatch.setattr(data, "_fetch_url", refuse)
    return tmp_path / "cache"


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (3, 2, 7), (0, 28, 28), (2, 3, 4, 5)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_idx_returns_what_was_written(tmp_path: Path, shape: tuple[int, ...], suffix: str):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    content = idx_bytes(array)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    read = read_idx(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\0\0\x08", "not an idx file"),
        (b"\0\0\x0d\x01\0\0\0\0", "not an idx file"),  # floats
        (b"PK\x03\x04 a zip archive", "not an idx file"),
        (GOOD[:9], "truncated: its header ends after 9 of 16 bytes"),
        (GOOD[:-1], r"truncated: 39 bytes, its shape \(2, 3, 4\) needs 40"),
        (GOOD + b"x", "too long: 41 bytes"),
        (PACKED[:-3], "truncated or corrupt"),
        (PACKED[:15], "truncated or corrupt"),
        (PACKED[:-8] + b"\0" * 8, "truncated or corrupt"),  # another checksum
        (b"\x1f\x8b nonsense", "truncated or corrupt"),
    ],
)
def test_read_idx_refuses_broken_files(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        read_idx(path)


def test_read_idx_names_a_missing_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match="absent cannot be read"):
        read_idx(tmp_path / "absent")


def test_a_folder_gives_all_tensors(tiny_fashion_mnist: Path, nowhere: Path):
    dataset = load_fashion_mnist(str(tiny_fashion_mnist))
    assert dataset.train_images.shape == (60, 28, 28)
    assert dataset.test_images.shape == (20, 28, 28)
    assert dataset.train_images.dtype is dataset.test_images.dtype is torch.uint8
    assert dataset.train_labels.dtype is dataset.test_labels.dtype is torch.int64
    images = read_idx(tiny_fashion_mnist / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(tiny_fashion_mnist / "train-labels-idx1-ubyte.gz")
    assert torch.equal(dataset.test_images, torch.tensor(images))
    assert torch.equal(dataset.train_labels, torch.tensor(labels.astype(np.int64)))
    assert str(tiny_fashion_mnist) in dataset.source
    dataset.train_images.zero_()  # owned, so writable


def test_unpacked_files_are_read_as_well(tiny_fashion_mnist: Path, nowhere: Path):
    packed = load_fashion_mnist(str(tiny_fashion_mnist))
    for path in tiny_fashion_mnist.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert torch.equal(load_fashion_mnist(str(tiny_fashion_mnist)).train_images, packed.train_images)


def test_order_of_sources(tiny_fashion_mnist: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch(folder: Path) -> None:
        shutil.copytree(tiny_fashion_mnist, folder, dirs_exist_ok=True)

    monkeypatch.setattr(data, "_fetch_url", fetch)
    assert load_fashion_mnist().source == data.URL
    shutil.rmtree(nowhere)
    monkeypatch.setattr(data, "_fetch_debian_package", fetch)
    assert "Debian package" in load_fashion_mnist().source
    cached = nowhere / "fashion-mnist"
    assert load_fashion_mnist().source == str(cached)
    shutil.copytree(tiny_fashion_mnist, data.SYSTEM_FOLDER)
    assert load_fashion_mnist().source == str(data.SYSTEM_FOLDER)
    monkeypatch.setenv(data.VARIABLE, str(cached))
    assert f"${data.VARIABLE}" in load_fashion_mnist().source
    assert "argument" in load_fashion_mnist(str(tiny_fashion_mnist)).source
    assert list(nowhere.iterdir()) == [cached]  # no temporary folder stays


def test_a_wrong_variable_is_an_error_although_other_sources_are_there(
    tiny_fashion_mnist: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(tiny_fashion_mnist, data.SYSTEM_FOLDER)
    monkeypatch.setenv(data.VARIABLE, str(nowhere / "elsewhere"))
    with pytest.raises(CheckpointError, match=rf"elsewhere holds no .*remedy: \${data.VARIABLE} must name"):
        load_fashion_mnist()


def test_no_source_is_one_line_with_every_attempt_and_a_remedy(nowhere: Path):
    with pytest.raises(InputError) as caught:
        load_fashion_mnist()
    message = str(caught.value)
    for part in (
        str(data.SYSTEM_FOLDER),
        str(nowhere),
        "Debian package",
        data.URL,
        "not in tests",
        "apt-get update",
        data.VARIABLE,
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("packed", [True, False])
def test_a_changed_pixel_is_refused(tiny_fashion_mnist: Path, nowhere: Path, packed: bool):
    path = tiny_fashion_mnist / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.unlink()
    changed = path if packed else path.with_suffix("")
    changed.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(CheckpointError, match=f"{changed} is not the published file.*remedy"):
        load_fashion_mnist(str(tiny_fashion_mnist))


def test_another_shape_is_refused(tiny_fashion_mnist: Path, nowhere: Path):
    path = tiny_fashion_mnist / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(19, dtype=np.uint8))))
    with pytest.raises(CheckpointError, match=r"t10k-labels.*shape \(19,\).*has \(20,\)"):
        load_fashion_mnist(str(tiny_fashion_mnist))


def test_a_truncated_cache_is_refused_with_its_remedy(tiny_fashion_mnist: Path, nowhere: Path):
    cached = nowhere / "fashion-mnist"
    shutil.copytree(tiny_fashion_mnist, cached)
    path = cached / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{path} is truncated or corrupt.*remedy: delete {cached}"):
        load_fashion_mnist()


def test_a_corrupt_fetch_is_not_published(
    tiny_fashion_mnist: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
):
    def fetch(folder: Path) -> None:
        shutil.copytree(tiny_fashion_mnist, folder, dirs_exist_ok=True)
        (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>Not found</html>")

    monkeypatch.setattr(data, "_fetch_url", fetch)
    with pytest.raises(InputError, match="t10k-images-idx3-ubyte.gz is not an idx file"):
        load_fashion_mnist()
    assert list(nowhere.iterdir()) == []


def test_the_authors_address_is_fetched_file_by_file(
    tiny_fashion_mnist: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Be quiet."""

    handler = functools.partial(Handler, directory=str(tiny_fashion_mnist))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(data, "_fetch_url", FETCH_URL)
        fetched = load_fashion_mnist()
        (tiny_fashion_mnist / "t10k-labels-idx1-ubyte.gz").rename(tiny_fashion_mnist / "moved.gz")
        shutil.rmtree(nowhere)
        with pytest.raises(InputError, match=f"{data.URL}: HTTP Error 404"):
            load_fashion_mnist()
        server.shutdown()
        thread.join()
    assert fetched.source == data.URL
    assert fetched.test_labels.shape == (20,)


def test_left_overs_of_killed_fetches_are_removed_and_running_ones_kept(
    tiny_fashion_mnist: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        data, "_fetch_url", lambda folder: shutil.copytree(tiny_fashion_mnist, folder, dirs_exist_ok=True)
    )
    killed, running = nowhere / ".fetch-killed", nowhere / ".fetch-running"
    killed.mkdir(parents=True)
    running.mkdir()
    os.utime(killed, (0, 0))
    load_fashion_mnist()
    assert not killed.exists()
    assert running.exists()


def test_another_process_that_publishes_first_is_no_error(
    tiny_fashion_mnist: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
):
    def fetch(folder: Path) -> None:
        shutil.copytree(tiny_fashion_mnist, folder, dirs_exist_ok=True)
        shutil.copytree(tiny_fashion_mnist, nowhere / "fashion-mnist")

    monkeypatch.setattr(data, "_fetch_url", fetch)
    assert load_fashion_mnist().source == data.URL


class TestDebianPackage:
    """With stand-ins for the two tools; the first `download` finds no package lists."""

    def tool(self, folder: Path, name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    @pytest.fixture
    def tools(self, tiny_fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        self.tool(
            folder,
            "apt-get",
            'case "$*" in\n'
            "  update*State::lists*) : > lists/ready ;;\n"
            "  download*State::lists*) test -e lists/ready && : > dataset-fashion-mnist_1_all.deb ;;\n"
            '  *) echo "E: Unable to locate package" >&2; exit 100 ;;\n'
            "esac",
        )
        place = f"$3{data.SYSTEM_FOLDER}"
        self.tool(folder, "dpkg-deb", f'mkdir -p "{place}" && cp {tiny_fashion_mnist}/* "{place}"')
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return folder

    def test_absent_package_lists_are_fetched_without_root(self, tools: Path, tmp_path: Path):
        target = tmp_path / "cache" / "fashion-mnist"
        dataset = data._fetch_into(target, "here", data._fetch_debian_package)
        assert dataset.train_images.shape == (60, 28, 28)
        assert sorted(path.name for path in target.iterdir()) == sorted(f"{name}.gz" for name in data.FILES)
        assert list(target.parent.iterdir()) == [target]

    def test_a_failure_tells_what_apt_said(self, tools: Path, tmp_path: Path):
        self.tool(tools, "apt-get", "echo 'E: Failed to fetch' >&2; exit 100")
        with pytest.raises(InputError, match="download.*failed: E: Failed to fetch.*fresh package lists"):
            data._fetch_into(tmp_path / "cache" / "x", "here", data._fetch_debian_package)

    def test_other_systems_are_told_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(InputError, match="apt-get is not on this machine"):
            data._fetch_debian_package(tmp_path)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert data.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("FLEXPERT_CACHE")
    assert data.cache_folder() == tmp_path / "b" / "flexpert"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_folder() == tmp_path / "c" / ".cache" / "flexpert"
