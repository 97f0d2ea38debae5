"""The cache of the library, damaged in every way, and odd surroundings of the build.

What the loader would take without a check kills the process: so each of these runs in one of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexpert.cli import doctor
from flexpert.core.errors import ConfigError
from flexpert.ops.cpu import build, seal

ROOT = Path(__file__).parents[3]
# Tells the live backend of one call, and why not the native one.
CALL = """
import torch
from flexpert import ops
x, w = torch.ones(2, 64), torch.ones(1, 64, 64)
y = ops.grouped_mlp(x, torch.arange(2), None, torch.tensor([2]), None, w, None, w, None, "relu")
assert y.eq(64 * 64).all()
print(*[row["backend"] for row in ops.report() if row["live"] and row["operator"] == "grouped_mlp"])
"""


@pytest.fixture
def compiler(found, tmp_path):
    """A command that takes no time: it links the library that is there."""
    if found.library is None:
        pytest.skip(f"native kernels are off: {found.reason}")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the cache has another library with the sanitizers")
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo 1; exit;; esac\necho "$*" >> "$0.calls"\n'
        'while [ "$1" != -o ]; do [ "$1" = -shared ] && linking=1; shift; done\n'
        f'if [ "$linking" ]; then cp {build.build()} "$2"; else : > "$2"; fi\n'
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def run(compiler, tmp_path):
    """A function that makes the call in a process: (the backend it took, what it said)."""

    def call(**changes):
        env = os.environ | {"PYTHONPATH": str(ROOT), "CXX": str(compiler), "FLEXPERT_NATIVE": "auto"}
        env |= {"FLEXPERT_CACHE": str(tmp_path / "cache")} | changes
        env = {name: value for name, value in env.items() if value is not None}
        command = [sys.executable, "-c", CALL]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.returncode} {done.stderr}"
        return done.stdout.strip(), done.stderr.strip()

    return call


def links(compiler):
    return sum("-shared" in line for line in Path(f"{compiler}.calls").read_text().splitlines())


def test_a_damaged_library_is_made_again(run, compiler, tmp_path):
    assert run() == ("native", "")
    (library,) = (tmp_path / "cache" / "native").glob("*.so")
    whole = library.read_bytes()
    other = library.with_name("flexpert-of-other-sources.so")
    other.write_bytes(whole)
    seal.seal(other, other.name)
    damages = [whole[: len(whole) // 2], whole[:9999] + bytes(len(whole) - 9999), other.read_bytes()]
    for number, damage in enumerate(damages):
        library.unlink()  # not written over: this very process may have it in its memory
        library.write_bytes(damage)
        assert run() == ("native", ""), number
        assert links(compiler) == number + 2
        assert library.read_bytes() == whole
    assert run() == ("native", "")
    assert links(compiler) == len(damages) + 1


def test_a_damaged_library_in_a_cache_that_cannot_be_written_to(run, tmp_path):
    run()
    (library,) = (tmp_path / "cache" / "native").glob("*.so")
    library.unlink()
    library.mkdir()
    (library / "file").touch()
    backend, line = run()
    assert backend == "portable"
    assert "cannot write to the cache" in line
    assert "\n" not in line


def test_what_a_killed_build_leaves_is_cleared_away(run, compiler, tmp_path):
    """By the next one, which does not wait for a lock of the dead."""
    usual = compiler.read_text()
    compiler.write_text(usual.replace("#!/bin/sh\n", '#!/bin/sh\ncase "$*" in *-c*) sleep 30;; esac\n'))
    env = {"PYTHONPATH": str(ROOT), "CXX": str(compiler), "FLEXPERT_CACHE": str(tmp_path / "cache")}
    env = os.environ | env
    command = [sys.executable, "-m", "flexpert", "build"]
    killed = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    folder = tmp_path / "cache" / "native"
    while not list(folder.glob("compiling-*")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list(folder.glob("compiling-*"))
    compiler.write_text(usual)
    assert run() == ("native", "")
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]  # the lock and the library


@pytest.mark.parametrize(
    "changes",
    [
        {"FLEXPERT_CACHE": "cache/below"},
        {"FLEXPERT_CACHE": "", "XDG_CACHE_HOME": "cache"},
        {"CXX": "./compiler"},
        {"FLEXPERT_NATIVE": "", "FLEXPERT_INSTRUCTIONS": ""},
        {"TMPDIR": "/no-such-folder"},
    ],
)
def test_names_from_here_and_empty_ones(run, changes):
    assert run(**changes) == ("native", "")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"CXX": "g++ '"}, 'no C++ compiler: CXX="g++ \'" is not a command: No closing quotation'),
        ({"FLEXPERT_CACHE": "/" + "x" * 300}, "cannot write to the cache"),
    ],
)
def test_what_cannot_be_leaves_the_portable_path(run, changes, why):
    backend, line = run(**changes)
    assert backend == "portable"
    assert why in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("printf 'x.cpp: error: \\351\\377 no\\n' >&2; exit 1", "failed: x.cpp: error: \ufffd\ufffd no"),
        ("kill -9 $$", "the C++ compiler failed: exit code -9"),
        (":", "wrote no library"),
        ("echo x.cpp: error: $LC_ALL in $TMPDIR >&2; exit 1", "error: C in "),
    ],
)
def test_compilers_that_fail(run, compiler, tmp_path, body, why):
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo 1; exit;; esac\n{body}\n')
    backend, line = run(LC_ALL="en_US.UTF-8")
    assert backend == "portable"
    assert why in line
    assert "\n" not in line
    assert [path.name for path in (tmp_path / "cache" / "native").iterdir()] == ["lock"]


def test_a_user_without_a_home(monkeypatch):
    for name in ("FLEXPERT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", no_home)
    why = "no place for the cache, as this user has no home; set FLEXPERT_CACHE"
    with pytest.raises(ConfigError, match=why):
        build.cache_folder()
    with pytest.raises(build.BuildError, match=why):
        build.target_path([sys.executable])
    monkeypatch.setenv("CXX", sys.executable)
    facts = doctor._native()
    assert facts["compiler_problem"] == why
    assert facts["cache"] is None
    assert "set FLEXPERT_CACHE" in "\n".join(doctor._native_lines(facts))


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_a_cache_of_another_user(compiler, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    script = "import os, torch; from flexpert import ops; os.setuid(65534)\n" + CALL
    env = {"PYTHONPATH": str(ROOT), "FLEXPERT_CACHE": str(closed), "CXX": "/bin/true"}
    env |= {"FLEXPERT_NATIVE": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "portable", done.stderr
    assert "cannot write to the cache" in done.stderr
