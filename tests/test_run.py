from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`run` in a checkout of its own, with steps that are noted in `steps` and not done."""
    for name in ("run", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    loader = importlib.machinery.SourceFileLoader("run_script", str(tmp_path / "run"))
    spec = importlib.util.spec_from_loader("run_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.steps = []

    def attempt(command: list[str], lock: int, failure: str) -> None:
        module.steps.append("venv" if "venv" in command else "pip")
        module.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        module.PYTHON.touch()

    module.really_attempt = module.attempt
    monkeypatch.setattr(module, "attempt", attempt)
    return module


def stops(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must stop with status 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as caught:
        script.main(list(arguments))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("./run: ")
    return lines[-1]


def test_setup_does_its_work_once(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert script.main(["setup"]) == 0
    assert script.steps == ["venv", "pip"]
    assert script.main(["setup"]) == 0
    assert script.steps == ["venv", "pip"]
    assert capsys.readouterr().out == ""


def test_other_packages_are_installed_into_the_same_environment(script: ModuleType):
    script.main(["setup"])
    kept = script.VENV / "kept"
    kept.touch()
    (script.ROOT / "constraints.txt").write_text("torch==2.12.0\n")
    script.main(["setup"])
    assert script.steps == ["venv", "pip", "pip"]
    assert kept.exists()


@pytest.mark.parametrize("missing", ["bin/python", "flexpert-setup"])
def test_a_half_made_environment_is_made_anew(script: ModuleType, missing: str):
    script.main(["setup"])
    broken = script.VENV / "broken"
    broken.touch()
    (script.VENV / missing).unlink()
    script.main(["setup"])
    assert script.steps == ["venv", "pip"] * 2
    assert not broken.exists()


def test_another_python_makes_it_anew(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    script.main(["setup"])
    monkeypatch.setattr(sys, "base_prefix", "/elsewhere")
    script.main(["setup"])
    assert script.steps == ["venv", "pip"] * 2


def test_a_set_up_that_fails_is_not_taken_for_finished(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    good = script.attempt

    def fails_at_pip(command: list[str], lock: int, failure: str) -> None:
        if "pip" in command:
            script.fail(failure)
        good(command, lock, failure)

    script.main(["setup"])
    (script.ROOT / "constraints.txt").write_text("torch==2.12.0\n")
    monkeypatch.setattr(script, "attempt", fails_at_pip)
    assert "could not install" in stops(script, capsys, "setup")
    monkeypatch.setattr(script, "attempt", good)
    script.main(["setup"])
    assert script.steps == ["venv", "pip", "venv", "pip"]


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("Could not install: [Errno 28] No space left on device", "no space is left on the disk"),
        ("Retrying after connection broken by 'NewConnectionError'", "there is no network"),
        ("error: invalid command", "see above"),
    ],
)
def test_a_failing_step_shows_its_end_and_names_the_cause(
    script: ModuleType, capsys: pytest.CaptureFixture[str], output: str, cause: str
):
    program = f"import tempfile; print(*range(100), sep='\\n'); print({output!r}); raise SystemExit(1)"
    lock = os.open(script.ROOT, os.O_RDONLY)
    with pytest.raises(SystemExit) as caught:
        script.really_attempt([sys.executable, "-c", program], lock, "it failed")
    os.close(lock)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == output
    assert f"./run: it failed: {cause}" in lines[-1]
    assert len(lines) == 16
    assert not (script.VENV / "tmp").exists()


def test_a_step_keeps_its_temporary_files_in_the_checkout(script: ModuleType):
    lock = os.open(script.ROOT, os.O_RDONLY)
    program = "import tempfile; print(tempfile.gettempdir())"
    script.really_attempt([sys.executable, "-c", program], lock, "it failed")
    os.close(lock)
    assert script.LOG.read_text().strip() == str(script.VENV / "tmp")


def test_what_is_missing_is_told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
        assert "Python 3.10 or newer is needed, this is 3.9.18" in stops(script, capsys, "setup")
    with monkeypatch.context() as patch:
        patch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=1.5e9))
        assert "4 GB are needed" in (line := stops(script, capsys, "test"))
        assert "1.5 GB are free" in line
    with monkeypatch.context() as patch:
        patch.setattr(script.importlib.util, "find_spec", lambda _: None)
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        assert f"sudo apt-get install {package}" in stops(script, capsys, "train")
    assert not script.VENV.exists()


@pytest.mark.parametrize("arguments", [["frobnicate"], ["setup", "now"], ["lint", "--fix"], [""]])
def test_unknown_commands_are_told_before_any_work(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    assert "there are: setup, train [...], test [...], lint, sanitize [...]" in stops(
        script, capsys, *arguments
    )
    assert script.steps == []


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_help_needs_no_environment(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    assert script.main(arguments) == 0
    assert "./run train" in capsys.readouterr().out
    assert script.steps == []


def test_commands_take_the_process_over(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.chdir(script.ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(os, "execv", lambda path, arguments: calls.append((path, arguments)))
    script.main(["train", "epochs=1", "--resume"])
    script.main(["test", "-k", "x"])
    python = str(script.PYTHON)
    train = [python, "-m", "flexpert", "train", "configs/fashion_mnist.yaml", "epochs=1", "--resume"]
    assert calls[0] == (python, train)
    assert calls[1] == (python, [python, "-m", "pytest", "-n", str(script.cores()), "-k", "x"])
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_sanitize_loads_the_libraries_of_the_compiler(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    calls = []
    monkeypatch.chdir(script.ROOT)
    monkeypatch.setattr(os, "execv", lambda path, arguments: calls.append(arguments))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho "/lib/${1#*=}"\n')
    compiler.chmod(0o755)
    os.environ["CXX"] = str(compiler)
    script.main(["sanitize", "-x"])
    assert calls[0][-5:] == ["--capture=sys", "-m", "not slow", "tests/ops/cpu", "-x"]
    assert os.environ["LD_PRELOAD"] == "/lib/libasan.so /lib/libstdc++.so"
    assert (os.environ["FLEXPERT_SANITIZE"], os.environ["FLEXPERT_NATIVE"]) == ("1", "require")
    compiler.write_text('#!/bin/sh\necho "${1#*=}"\n')
    assert "has no libasan.so; install g++" in stops(script, capsys, "sanitize")
    os.environ["CXX"] = str(tmp_path / "missing")
    assert "the sanitizers need g++" in stops(script, capsys, "sanitize")


def test_lint_fails_if_one_check_fails(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(script.ROOT)
    script.main(["setup"])
    for failing in ("check", "--check", "mypy"):
        monkeypatch.setattr(
            script.subprocess,
            "run",
            lambda command, check, failing=failing: SimpleNamespace(returncode=int(failing in command)),
        )
        assert script.main(["lint"]) == 1
    monkeypatch.setattr(script.subprocess, "run", lambda command, check: SimpleNamespace(returncode=0))
    assert script.main(["lint"]) == 0


def test_python_3_7_can_read_the_script_and_so_print_its_message():
    ast.parse((ROOT / "run").read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("name", ["run", ".ci/run"])
def test_the_scripts_are_executable(name: str):
    assert os.access(ROOT / name, os.X_OK)
