from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexpert.cli import main
from flexpert.ops.cpu import build as native


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that only notes its calls, and a cache of its own; what it makes is taken for a library."""
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\necho "$*" >> "$0.calls"\n'
        'while [ $# -gt 0 ]; do case "$1" in -o) touch "$2";; --version) echo 1;; esac; shift; done\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLEXPERT_NATIVE", raising=False)
    monkeypatch.setattr(native, "load", lambda path: None)
    monkeypatch.setattr(native.platform, "system", lambda: "Linux")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    return script


def links(compiler: Path) -> int:
    return sum("-shared" in line for line in Path(f"{compiler}.calls").read_text().splitlines())


def test_builds_once_and_again_when_forced(compiler: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for flags in ([], [], ["--force"]):
        assert main(["build", "--json", *flags]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [result["compiled"] for result in results] == [True, False, True]
    assert len({result["path"] for result in results}) == 1
    assert Path(results[0]["path"]).exists()
    assert results[0]["compiler"] == str(compiler)
    assert all(result["seconds"] >= 0 for result in results)
    assert links(compiler) == 2
    assert main(["build"]) == 0
    assert "already in the cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("off", "FLEXPERT_NATIVE=off turns the native kernels off"),
        ("mode", "FLEXPERT_NATIVE='yes' is unknown"),
        ("compiler", "no C++ compiler: CXX='no-such-compiler' is not a command"),
        ("machine", "no native kernels for Linux on aarch64"),
        ("processor", "the native kernels need AVX2"),
    ],
)
def test_what_cannot_be_is_one_line(
    compiler: Path, change: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise native.BuildError("the native kernels need AVX2")

    if change in {"off", "mode"}:
        monkeypatch.setenv("FLEXPERT_NATIVE", "off" if change == "off" else "yes")
    elif change == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif change == "machine":
        monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    else:
        monkeypatch.setattr(native, "load", refuse)
    assert main(["build"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"flexpert build: error: {why}" in err.splitlines()[-1]


def test_the_real_one() -> None:
    """Whatever this machine can do: a library that loads, or the reason."""
    try:
        path = native.build()
    except native.BuildError as error:
        pytest.skip(str(error))
    assert native.load(path).library is not None
