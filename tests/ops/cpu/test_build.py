"""Compiling on first use: cached, safe at once, and never in the way when it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexpert import ops
from flexpert.core.errors import ConfigError
from flexpert.ops.cpu import backend, build, calls, route

ROOT = Path(__file__).parents[3]
CALL = """
import torch
from flexpert import ops
torch.set_num_threads(1)
x_, w = torch.ones(64, 256), torch.ones(1, 256, 256)
def call(tokens=64):
    x, rows = x_[:tokens], torch.arange(tokens)
    return ops.grouped_mlp(x, rows, None, torch.tensor([tokens]), None, w, None, w, None, "relu")[0, 0].item()
"""


def run(script, **env):
    done = subprocess.run(
        [sys.executable, "-c", CALL + script], capture_output=True, text=True, check=False,
        timeout=build.COMPILE_SECONDS, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def reasons():
    rows = ops.report()
    return {row["why"] for row in rows if row["backend"] == "native" and row["operator"] == "grouped_mlp"}


def script_file(folder, text):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("path", "no C++ compiler: install g"),
        ("missing", "no C++ compiler: CXX='no-such-compiler' is not a command"),
        ("failing", "the C++ compiler failed: x.cpp:1: error: no"),
        ("cache", "cannot write to the cache"),
        ("machine", "no native kernels for Linux on aarch64"),
        ("garbage", "cannot load"),
        ("old processor", "the native kernels need AVX2 and FMA, which this processor has not"),
    ],
)
def test_failures_leave_the_portable_path(make_case, fresh, monkeypatch, tmp_path, caplog, change, why):
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if change == "path":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif change == "missing":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif change == "failing":
        text = 'case "$*" in *--version*) echo 1;; *) echo x.cpp:1: error: no >&2; exit 1;; esac'
        monkeypatch.setenv("CXX", script_file(tmp_path, text))
    elif change == "cache":
        monkeypatch.setenv("CXX", script_file(tmp_path, "echo 1"))
        monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path / "compiler" / "below"))
    elif change == "machine":
        monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    elif change == "garbage":
        (tmp_path / "x.so").write_text("no library")
        monkeypatch.setattr(build, "build", lambda: tmp_path / "x.so")
    else:
        monkeypatch.setattr(build, "build", lambda: tmp_path / "x.so")
        library = type("Library", (), {"flexpert_features": staticmethod(lambda: 0)})()
        monkeypatch.setattr(build.ctypes, "CDLL", lambda path: library)
        monkeypatch.setattr(type(library), "flexpert_features", type("F", (), {"__call__": lambda self: 0})())
    case = make_case(dtype=torch.float32)
    for _ in range(2):
        assert ops.grouped_mlp(*case.args).isfinite().all()
    (reason,) = reasons()
    assert why in reason
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert why in lines[0]
    assert "\n" not in lines[0]
    monkeypatch.setattr(build, "_native", None)
    monkeypatch.setenv("FLEXPERT_NATIVE", "require")
    with pytest.raises(ConfigError, match="FLEXPERT_NATIVE=require, but"):
        build.native()


def test_off_is_silent(make_case, fresh, monkeypatch, caplog):
    monkeypatch.setenv("FLEXPERT_NATIVE", "off")
    assert ops.grouped_mlp(*make_case(dtype=torch.float32).args).isfinite().all()
    assert reasons() == {"turned off by FLEXPERT_NATIVE=off"}
    assert not caplog.records


def test_unknown_mode(fresh, monkeypatch):
    monkeypatch.setenv("FLEXPERT_NATIVE", "yes")
    with pytest.raises(
        ConfigError, match="FLEXPERT_NATIVE='yes' is unknown; choose one of: auto, off, require"
    ):
        build.native()


def test_unknown_instructions(live, monkeypatch):
    monkeypatch.setenv("FLEXPERT_INSTRUCTIONS", "sse")
    monkeypatch.setattr(build, "_native", None)
    with pytest.raises(ConfigError, match="FLEXPERT_INSTRUCTIONS='sse' is unknown; choose one of: avx2, avx"):
        build.native()


@pytest.mark.parametrize(
    ("found", "fp32", "bf16"),
    [
        ({}, "AVX2", "AVX2"),
        ({"avx512": True}, "AVX-512", "AVX2"),
        ({"avx512": True, "avx512_bf16": True}, "AVX-512", "AVX512_BF16"),
        ({"avx512": True, "avx512_bf16": True, "amx": True}, "AVX-512", "AMX"),
        ({"avx512": True, "avx512_bf16": True, "amx": True, "cap": "avx512"}, "AVX-512", "AVX512_BF16"),
        ({"avx512": True, "avx512_bf16": True, "amx": True, "cap": "avx2"}, "AVX2", "AVX2"),
    ],
)
def test_instructions_by_what_the_processor_has(found, fp32, bf16):
    native = build.Native(None, "", avx2=True, **found)
    assert native.instructions(torch.float32) == fp32
    assert native.instructions(torch.bfloat16) == bf16


@pytest.mark.each_cap
def test_the_cap_decides_what_is_called_and_told(live, cap, monkeypatch):
    called = []

    class Library:
        def __getattr__(self, name):
            called.append(name)
            return lambda *call: 0

    monkeypatch.setattr(build, "_native", replace(live, library=Library()))
    for module in (backend, calls):
        monkeypatch.setattr(module, "_functions", {})
    unit, count = torch.arange(2), torch.tensor([2])
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(2, 3, dtype=dtype), torch.ones(1, 3, 3, dtype=dtype)
        backend.grouped_mlp(x, unit, None, count, None, w, None, w, None, "relu", False)
    route.router_logits(x, x)
    backend.KERNELS["gather_rows"](x, unit, count)
    end = "_avx2" if cap == "avx2" else ""
    end_bf16 = end if live.avx512_bf16 else "_avx2"
    assert called == [
        f"flexpert_mlp_f32{end}",
        f"flexpert_mlp_bf16{end_bf16}",
        f"flexpert_router_logits{end}",
        f"flexpert_gather_rows{end}",
    ]
    rows = {row["operator"]: row["why"] for row in ops.report() if row["live"]}
    name = "AVX2" if cap == "avx2" else "AVX-512"
    for operator in ("grouped_mlp", "route"):
        assert rows[operator] == f"use_backend names it, with {name}"


def test_what_units_share_is_linked_from_those_that_run_on_most_processors():
    """The linker keeps the first of equal functions; one with AVX-512 would kill others."""
    flags = [set(unit) for unit in build.UNITS.values()]
    wide = ["-mavx512f" in unit for unit in flags]
    assert wide == sorted(wide)
    assert flags[0] == set()


def test_compiled_once_by_processes_that_start_together(live, tmp_path):
    counter = tmp_path / "compiler"
    compiler = build.find_compiler()[0]
    counter.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nexec {compiler} "$@"\n')
    counter.chmod(0o755)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FLEXPERT_CACHE": str(tmp_path / "cache"),
        "CXX": str(counter),
    }
    env |= {"FLEXPERT_NATIVE": "require"}
    command = [sys.executable, "-c", "from flexpert.ops.cpu import build; print(build.native().library)"]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all("flexpert-" in child.communicate(timeout=build.COMPILE_SECONDS)[0] for child in both)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("-shared" in line for line in calls) == 1
    assert len(list((tmp_path / "cache" / "native").glob("*"))) == 2  # the library and the lock


def test_nothing_is_built_at_import(tmp_path):
    cache = tmp_path / "cache"
    run("import flexpert", FLEXPERT_CACHE=str(cache), FLEXPERT_NATIVE="require")
    assert not cache.exists()


def test_one_pool_of_threads_of_the_size_asked_for(live):
    script = """
import os
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1); call(1); before = tasks()
call(); print(tasks() - before)
torch.set_num_threads(3); call(); print(tasks() - before)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}))
"""
    assert run(script) == ["0", "2", "1"]


def test_a_forked_child_does_not_hang(live):
    """PyTorch's own operators would, were they large enough for two threads: the child calls only ours."""
    script = """
import os
torch.set_num_threads(2); want = call()
pid = os.fork()
if pid == 0:
    os._exit(0 if call() == want else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(script) == ["0"]


def test_sanitized_is_another_library_that_needs_its_runtime(fresh, monkeypatch, tmp_path):
    (tmp_path / "x.so").touch()
    if "libasan" not in Path("/proc/self/maps").read_text():
        monkeypatch.setenv("FLEXPERT_SANITIZE", "1")
        with pytest.raises(
            build.BuildError, match="needs libasan.so in LD_PRELOAD; `./run sanitize` sets it"
        ):
            build.load(tmp_path / "x.so")
    keys = set()
    for value in ("0", "1"):
        monkeypatch.setenv("FLEXPERT_SANITIZE", value)
        keys.add(build._key([sys.executable]))
    assert len(keys) == 2


def test_the_sanitizers_are_shown_every_instruction_they_cannot_see():
    header = (build.SOURCES / "sanitize.h").read_text()
    shown = set(re.findall(r"#define (_\w+)", header))
    masked = r"_mm\w*_(?=\w*mask)\w*(?:load|store|expand|compress)\w*"
    hidden = re.compile(masked + r"|_mm\w*(?:stream|gather|scatter)\w*|_tile_(?:load|store|stream)\w*")
    for source in build.SOURCES.iterdir():
        used = set(hidden.findall(source.read_text())) if source.name != "sanitize.h" else set()
        assert used <= shown, f"{source.name}: cover {used - shown} in sanitize.h"


@pytest.mark.parametrize("flags", [build.AVX2, build.AVX512])
def test_the_sanitizers_see_masked_instructions(live, tmp_path, flags):
    if flags == build.AVX512 and not live.avx512:
        pytest.skip("this processor has no AVX-512")
    source, program = tmp_path / "x.cpp", tmp_path / "x"
    source.write_text("""
#include <cstdlib>
#include "vector.h"
int main(int count, char** words) {
  float* four = static_cast<float*>(std::calloc(4, 4));
  const int lanes = std::atoi(words[2]);
  Vector value = constant(0.0f);
  if (words[1][0] == 'l') value = load_row(four, lanes);
  if (words[1][0] == 's') store_row(four, value, lanes);
  return reduce_add(value) != 0;
}
""")
    options = *build.FLAGS, *flags, *build.SANITIZERS, f"-I{build.SOURCES}"
    command = [*build.find_compiler(), *options, source, "-o", program]
    subprocess.run(command, check=True)
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    env.pop("LD_PRELOAD", None)
    for word in ("load", "store"):
        done = [
            subprocess.run([program, word, lanes], env=env, capture_output=True, check=False)
            for lanes in "45"
        ]
        assert done[0].returncode == 0
        assert done[1].returncode != 0
        assert b"heap-buffer-overflow" in done[1].stderr
