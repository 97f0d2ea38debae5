from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import flexpert
from flexpert.cli import COMMANDS, main


def test_doctor_tells_which_operators_are_live(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    live = {row["operator"]: row["backend"] for row in facts["operators"] if row["live"]}
    assert {"assign", "gather_rows", "grouped_linear", "grouped_mlp", "scatter_combine"} <= live.keys()
    assert all(row["why"] for row in facts["operators"])
    assert {row["name"] for row in facts["packages"]} == {"transformers", "tensorboard", "matplotlib"}
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert f"flexpert {flexpert.__version__}" in page
    assert "grouped_mlp" in page


def test_an_error_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flexpert train: error: cannot read the config")
    assert err.count("\n") == 1


def test_a_rank_that_has_no_result_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flexpert.train.job.evaluate", lambda folder, overrides: None)
    for flags in ([], ["--json"]):
        assert main(["evaluate", str(tmp_path), *flags]) == 0
    assert capsys.readouterr() == ("", "")


def test_settings_may_stand_on_both_sides_of_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("flexpert.train.job.evaluate", lambda folder, overrides: seen.update(overrides))
    assert main(["evaluate", str(tmp_path), "top_k=2", "--json", "capacity_factor=0.5", "a.b=[-1, x]"]) == 0
    assert seen == {"top_k": 2, "capacity_factor": 0.5, "a.b": [-1, "x"]}
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--json", "top_k=2", "--what"])
    assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["trian"], ["train"], ["doctor", "--what"], ["doctor", "--json", "what=1"]]
)
def test_wrong_usage_is_status_two(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "usage: flexpert" in capsys.readouterr().err


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.NAME)
def test_every_command_has_help_with_examples_and_json(
    module: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([module.NAME, "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert "examples:" in page
    assert "--json" in page


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flexpert", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"flexpert {flexpert.__version__}\n"


def test_train_and_evaluate_print_one_json_object(
    tmp_path: Path, tiny_fashion_mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
    settings = [
        "model={preset: tiny, embed_dim: 16, depths: [1, 2], num_heads: [2, 2],"
        " pretrained_window_sizes: [0, 0]}",
        "optimizer.batch_size=16",
        "optimizer.epochs=1",
        f"data.folder={tiny_fashion_mnist}",
        f"output={tmp_path}",
    ]
    assert main(["train", str(config), *settings, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "step 3/3" in err
    assert main(["evaluate", result["run"], "capacity_factor=0.5", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"accuracy", "images", "seconds"} <= figures.keys()
    assert figures["routing"] == {"capacity_factor": 0.5}
    assert main(["evaluate", result["run"], "top_k=2"]) == 0
    assert "with top_k=2" in capsys.readouterr().out
