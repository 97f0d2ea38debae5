"""Rooms import downwards only, and importing Flexpert imports nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import flexpert

ROOT = Path(flexpert.__file__).parent

# A room may import those on lines above its own. Rooms on one line may import each other where no circle
# results, except on the lines marked as strict.
STRICT = True
LINES = [
    (["core"], STRICT),
    (["ops"], STRICT),
    (["dispatch"], STRICT),
    (["routers", "experts", "combine", "losses", "balancers", "parallel"], STRICT),
    (["transport"], STRICT),
    (["layer"], STRICT),
    (["scope"], STRICT),
    (
        [
            "tune",
            "convert",
            "models",
            "compress",
            "placement",
            "simulate",
            "emulate",
            "monitor",
            "train",
            "testing",
        ],
        not STRICT,
    ),
    (["integrations"], STRICT),
    (["bench"], STRICT),
    (["cli"], STRICT),
]
LEVEL = {room: level for level, (rooms, _) in enumerate(LINES) for room in rooms}
STRICT_LEVELS = {level for level, (_, strict) in enumerate(LINES) if strict}
# The package itself offers the public names of rooms; only what runs the whole may import it.
TOP = {"__init__": "everything", "__main__": "everything"}


def room_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """The rooms that a file imports, with the lines it does so on."""
    package = ("flexpert", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from flexpert import ops` names a room after the import.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "flexpert" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "flexpert":
                yield (parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"), node.lineno


FILES = sorted(path for path in ROOT.rglob("*.py"))


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in FILES} - TOP.keys()
    assert rooms <= LEVEL.keys(), f"rooms without a line in this test: {sorted(rooms - LEVEL.keys())}"
    assert {"core", "ops", "routers", "layer", "scope"} <= rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = room_of(path)
    if room in TOP or path.name == "__main__.py":
        return
    for other, line in imports(path):
        if other == room:
            continue
        if other == "__init__":
            assert room == "cli", f"{path}:{line} imports the package itself"
            continue
        allowed = LEVEL[other] < LEVEL[room] or (
            LEVEL[other] == LEVEL[room] and LEVEL[room] not in STRICT_LEVELS
        )
        assert allowed, f"{path}:{line}: {room} imports {other}, which is not below it"


def test_no_circles():
    graph = {}
    for path in FILES:
        if room_of(path) not in TOP and path.name != "__main__.py":
            graph.setdefault(room_of(path), set()).update(
                other for other, _ in imports(path) if other in LEVEL
            )
    graph = {room: others - {room} for room, others in graph.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_the_reader_of_imports_sees_all_forms(tmp_path, monkeypatch):
    """Against its own blindness: each way to write an upward import is found."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "core").mkdir()
    file = tmp_path / "core" / "bad.py"
    for source, room in {
        "import flexpert.layer": "layer",
        "from flexpert.layer import MoE": "layer",
        "from flexpert import ops": "ops",
        "from flexpert import MoE": "__init__",
        "from ..routers import Router": "routers",
        "from ..routers.base import Router": "routers",
        "from .. import scope": "scope",
        "from . import errors": "core",
        "from .errors import InputError": "core",
        "def f():\n    from flexpert.models import x": "models",
        "if TYPE_CHECKING:\n    from flexpert.cli import main": "cli",
    }.items():
        file.write_text(source, encoding="utf-8")
        assert [other for other, _ in imports(file)] == [room], source


def test_importing_flexpert_imports_nothing_heavy():
    heavy = ["transformers", "matplotlib", "tensorboard", "torchvision", "datasets", "yaml", "safetensors"]
    heavy += ["torch._inductor", "torch.utils.tensorboard", "hypothesis", "pytest"]
    code = (
        "import sys, flexpert\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('flexpert.')}\n"
        f"print([name for name in {heavy} if name in sys.modules], sorted(rooms))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    loaded, rooms = result.stdout.strip().split("] [")
    assert loaded == "[", f"import flexpert imports {loaded}]"
    for room in ("cli", "bench", "train", "models", "monitor", "testing", "parallel"):
        assert f"'{room}'" not in rooms
