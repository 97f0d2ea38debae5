from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from flexpert.cli import bench, build_parser, main

TINY = [
    "bench",
    "--tokens",
    "8",
    "--model-dim",
    "16",
    "--hidden-dim",
    "16",
    "--experts",
    "4",
    "--seconds",
    "0.1",
]
ROOT = Path(__file__).parents[2]


def test_json_is_all_there_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--dtype", "fp32", "--implementations", "flexpert", "sort + loop", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert {"machine", "configs", "rows"} <= result.keys()
    rows = {(row["mode"], row["implementation"]): row for row in result["rows"]}
    assert set(rows) == {
        *(
            (mode, name)
            for mode in ("forward", "forward+backward")
            for name in ("flexpert", "dense", "sort + loop")
        ),
        *(("decode", name) for name in ("flexpert", "stream", "sort + loop")),
    }
    assert rows["forward", "flexpert"]["config"] == "custom"
    assert rows["forward+backward", "flexpert"]["peak_mib"] > 50
    assert "custom fp32, 8 tokens: forward+backward" in err


def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = tmp_path / "layer"
    assert (
        main(
            [*TINY, "--dtype", "bf16", "--no-memory", "--implementations", "flexpert", "--output", str(stem)]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "## custom, bf16" in out
    assert "| flexpert |" in out
    assert f"{stem}.json" in out
    assert {path.name for path in tmp_path.iterdir()} == {"layer.json", "layer.md", "layer.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "9"], "--top-k 9: expected at most the number of experts, 8; see --experts"),
        (["--configs", "Z"], "--configs 'Z' is unknown; choose of: A, B, C, D"),
        (["--seconds", "-1"], "--seconds -1.0: expected a number > 0"),
        (["--output", "/dev/null/x"], "--output /dev/null/x: "),
    ],
)
def test_wrong_values_are_status_two(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flexpert bench: error: {message}")
    assert err.count("\n") == 1


def commands() -> list[str]:
    """Every `flexpert bench` that a page or the help shows."""
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "layer" / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    found = [re.sub(r"^\S*bin/", "", line) for line in shown if re.match(r"(\S*bin/)?flexpert bench", line)]
    return [*found, *bench.EXAMPLES]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_are_accepted(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flexpert.bench.run_benchmark", lambda plan: {"cells": len(plan.cells)})
    monkeypatch.setattr("flexpert.bench.write", lambda result, stem: [stem])
    options = build_parser().parse_args(shlex.split(line, comments=True)[1:])
    assert bench.run(options)["cells"] > 0
