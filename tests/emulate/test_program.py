"""The compiler's part: cached, and its failures told."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flexpert.core.errors import ConfigError
from flexpert.emulate import program


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path / "cache"))


def stand_in(folder: Path, script: str) -> str:
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f'echo x >> {tmp_path}/calls; while [ "$1" != -o ]; do shift; done; echo program > "$2"'
    monkeypatch.setenv("CXX", stand_in(tmp_path, script))
    assert program.build() == program.build() == program.target_path()
    assert program.target_path().read_text() == "program\n"
    assert (tmp_path / "calls").read_text() == "x\n"
    assert list(program.target_path().parent.iterdir()) == [program.target_path()]
    monkeypatch.setenv("CXX", "/no/compiler")
    assert program.why_not() == ""  # it is there


def test_failures_are_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    assert "CXX='/no/compiler' is not a command" in program.why_not()
    with pytest.raises(ConfigError, match="mode='bandwidth' needs no compiler"):
        program.build()
    monkeypatch.setenv("CXX", stand_in(tmp_path, "echo 'note'; echo 'x.cpp:1: error: no' >&2; exit 1"))
    with pytest.raises(ConfigError, match="the switch does not compile: x.cpp:1: error: no"):
        program.build()
    monkeypatch.setenv("FLEXPERT_CACHE", "/proc/no-cache")
    with pytest.raises(ConfigError, match="cannot be compiled"):
        program.build()


def test_the_program_refuses_wrong_words() -> None:
    if why := program.why_not():
        pytest.skip(why)
    done = subprocess.run([program.build(), "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: switch FD RATE DELAY")
    done = subprocess.run([program.build(), "99", "0", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "port 0: Bad file descriptor" in done.stderr
