from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexpert.core.errors import ConfigError
from flexpert.emulate.python_command import PythonProgram, parse_python, preload, program_to_fork


@pytest.mark.parametrize(
    ("words", "program"),
    [
        ("python a.py", PythonProgram("a.py", False, ())),
        ("python -u a.py -m x", PythonProgram("a.py", False, ("-m", "x"))),
        ("python -m a.b --lr 3", PythonProgram("a.b", True, ("--lr", "3"))),
        ("python", None),
        ("python -m", None),
        ("python -c pass", None),
        ("python -O a.py", None),
        ("python -u", None),
    ],
)
def test_forms_of_python_commands(words: str, program: PythonProgram | None) -> None:
    assert parse_python(words.split()) == program


def test_only_this_interpreter_is_forked_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "python3"
    other.symlink_to(Path(sys.executable).resolve())  # the same program, of another environment
    script = [sys.executable, "a.py"]
    assert program_to_fork(script, None) == program_to_fork(script, True) == PythonProgram("a.py", False, ())
    assert program_to_fork(script, False) is None
    assert program_to_fork([str(other), "a.py"], None) is None
    assert program_to_fork([str(other), "a.py"], True) == PythonProgram("a.py", False, ())
    assert program_to_fork(["sh", "a.py"], None) is None
    assert program_to_fork(["no-python-here", "a.py"], None) is None
    assert program_to_fork(["python9.99", "a.py"], None) is None
    with pytest.raises(ConfigError, match="'sh a.py' is not `python SCRIPT ...`"):
        program_to_fork(["sh", "a.py"], True)


def test_a_module_that_cannot_be_imported_is_told() -> None:
    preload(["json"])
    with pytest.raises(ConfigError, match="preload: No module named 'no_such_module'"):
        preload(["no_such_module"])
