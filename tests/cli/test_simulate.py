from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from flexpert.cli import main

JOB = ["--model", "layer:num_experts=16", "--cluster", "a100-ndv4:nodes=2", "--batch", "16384"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "simulate", *JOB, "--plan", "degree=2", "--traffic", "zipf:skew=1")
    assert result["ranks"] == 16
    assert result["plan"]["degree"] == 2
    assert sum(result["parts"].values()) == pytest.approx(result["seconds"])
    assert result["bottleneck"] in result["parts"]
    assert sum(result["memory"].values()) == result["total_memory"]
    assert result["fits"] is True
    assert result["files"] == []


def test_a_step_as_text_and_its_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = tmp_path / "step.json", tmp_path / "step.png"
    files = ["--timeline", str(trace), "--plot", str(picture), "--ranks", "1", "9"]
    assert main(["simulate", *JOB, *files]) == 0
    out = capsys.readouterr().out
    for words in ("phases on the critical path", "<- bottleneck", "memory of a rank", f"written: {trace}"):
        assert words in out
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert {event["pid"] for event in events} == {1, 9}
    assert {event["cat"] for event in events} == {"compute", "communication"}
    assert {event["ph"] for event in events} == {"X"}
    assert picture.stat().st_size > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"step.json", "step.png"}


def test_a_row_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "simulate", "--paper", "t5")
    assert result["row"] == "T5"
    assert {"name", "paper", "ours", "error", "unit", "note"} == result["rows"][0].keys()
    assert main(["simulate", "--paper", "T5"]) == 0
    assert "| 4096 tokens: dense tensors | 3.7 |" in capsys.readouterr().out


def test_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "plan", *JOB, "--top", "3", "--no-sensitivity")
    assert len(result["ranked"]) == 3
    assert result["best"] == result["ranked"][0]
    assert result["sensitivity"] == {}
    axes, plan = result["meshes"], result["best"]["plan"]
    assert axes["dense"] == {"copies": 16 // plan["dense_shards"], "shards": plan["dense_shards"]}
    assert math.prod(axes["experts"].values()) == 16
    assert axes["experts"]["replica"] == plan["replicas"]
    picture, curve = tmp_path / "map.png", tmp_path / "scaling.png"
    small = ["--model", "layer:num_experts=4", "--cluster", "a100-ndv4:devices=4", "--batch", "64"]
    assert main(["plan", *small, "--map", str(picture), "--scaling", str(curve)]) == 0
    out = capsys.readouterr().out
    for words in (
        "best: ",
        "  experts: mesh ",
        "  a rank: 1 x 16 tokens a step",
        "| 1 | ",
        "what would change the answer:",
        "batch x 2: ",
    ):
        assert words in out
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "--model", "layer"], "simulate: error: --cluster is missing"),
        (["plan", *JOB[2:]], "plan: error: --model is missing"),
        (["simulate", *JOB, "--plan", "r=3"], "simulate: error: plan: r=3 with 1 slices"),
        (["simulate", *JOB, "--plot", "."], "simulate: error: .: it is a folder"),
        (["simulate", *JOB, "--ranks", "1"], "simulate: error: --ranks 1 ...: of which timeline?"),
        (["simulate", *JOB, "--step", "-1"], "simulate: error: step=-1"),
        (["simulate", *JOB[:-1], "0"], "simulate: error: batch=0"),
        (["simulate", *JOB[:-1], "17"], "simulate: error: batch=17 does not divide over 16 ranks"),
        (["plan", *JOB, "--top", "0"], "plan: error: top=0"),
        (["plan", *JOB[:-1], "-16"], "plan: error: batch=-16"),
        (
            ["simulate", "--model", "layer:num_experts=12", *JOB[2:]],
            "simulate: error: 12 experts on 16 ranks: one number must divide the other",
        ),
        (
            ["simulate", *JOB, "--timeline", "/nowhere/x.json"],
            "simulate: error: /nowhere/x.json: there is no",
        ),
        (["simulate", "--paper", "T99"], "simulate: error: paper: unknown row 'T99'"),
        (
            ["plan", "--model", "mixtral-8x7b", "--cluster", "a100-ndv4", "--batch", "8"],
            "plan: error: mixtral-8x7b with batch=8 does not fit 8 ranks of 72.0 GiB",
        ),
    ],
)
def test_what_cannot_be_is_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flexpert {message}")
    assert err.count("\n") == 1
