"""The language job: what a run leaves, resume, the same losses on ranks, generation from a run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexpert.cli import main
from flexpert.core.errors import ConfigError
from flexpert.monitor.metrics import read_metrics
from flexpert.testing import run_ranks
from flexpert.train.config import load_config
from flexpert.train.generate import generate
from flexpert.train.job import evaluate
from flexpert.train.language import LanguageTask
from tests.train import language_ranks as on_ranks

SMALL = [
    "model={preset: tiny, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,"
    " num_attention_heads: 2, num_experts: 4, num_experts_per_tok: 2, expert_hidden_dim: 8,"
    " max_position_embeddings: 64, balance_weight: 0.01}",
    "data.sequence_length=16",
    "optimizer.dtype=float32",
    "optimizer.batch_size=5",  # 3 and 2 windows on two ranks
    "optimizer.epochs=0.1",
    "checkpoint_every=3",
    "log_every=1",
    "threads=1",
    "device=cpu",
    "parallel.plan={}",  # the same in every run: nothing is measured, nothing differs in the order of sums
]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    folder = tmp_path / "text"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(50):
        letters = torch.randint(97, 103, (100,), generator=generator).tolist()
        (folder / f"{i}.txt").write_bytes(bytes(letters))
    return [*SMALL, f"data.folder={folder}", f"output={tmp_path / 'runs'}"]


def losses(run: Path | str) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(run))]


def test_a_run_leaves_a_model_that_writes(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = on_ranks.run(settings)
    run = Path(result["run"])
    assert result["steps"] == 6
    assert result["bits_per_byte"] == pytest.approx(result["validation_loss"] / math.log(2))
    assert result["sample"].startswith("def main():\n")
    lines = read_metrics(run)
    assert {"loss", "bits_per_byte", "balance", "load", "tokens_per_second"} <= lines[0].keys()
    assert lines[-1]["bits_per_byte"] < lines[0]["bits_per_byte"]
    assert [Path(plot).name for plot in result["plots"]] == ["learning_curve.png", "load.png"]
    biases = [t for n, t in load_file(run / "model" / "model.safetensors").items() if "selection_bias" in n]
    assert biases
    assert all(bool(bias.abs().max() > 0) for bias in biases)
    again = evaluate(run, {})
    assert again is not None
    assert again["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
    assert main(["generate", str(run), "--prompt", "ab", "--tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert main(["generate", str(run), "--prompt", "ab", "--tokens", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert shown.startswith("ab" + told["text"])
    assert told["tokens"] == 8


def test_the_figures_are_those_of_a_loop_over_the_text(settings: list[str]) -> None:
    task = LanguageTask(load_config(on_ranks.CONFIG, settings))
    task.model.double().eval()
    text, length = task.dataset.valid.long(), task.length
    total, count = 0.0, 0
    for start in range(0, len(text) - length, length):
        window = text[start : start + length + 1]
        with torch.no_grad():
            p = task.model(window[None, :-1]).logits[0].softmax(-1)
        total -= float(p[torch.arange(length), window[1:]].log().sum())
        count += length
    figures = task.evaluate()
    assert figures["bytes"] == count
    assert figures["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_ranks_train_as_one_process_does(settings: list[str]) -> None:
    alone = on_ranks.run(settings)
    for more in (["parallel.plan={r: 1, degree: 2}"], ["parallel.plan.r=0", "optimizer.accumulate=1"]):
        first, other = run_ranks(on_ranks.run, 2, [*settings, *more], timeout=300)
        assert other is None
        assert losses(first["run"]) == pytest.approx(losses(alone["run"]), rel=1e-5)
        assert first["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-4)


def test_a_run_resumes_to_the_same_bits(settings: list[str]) -> None:
    run = Path(on_ranks.run([*settings, "name=one"])["run"])
    weights = load_file(run / "model" / "model.safetensors")
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))
    on_ranks.run([*settings, "name=one"], resume=True)
    again = load_file(run / "model" / "model.safetensors")
    assert all(again[name].equal(value) for name, value in weights.items())


def test_the_dense_twin_and_other_routers_train(settings: list[str]) -> None:
    model = settings[0]
    for change in (
        "num_experts: 0",
        "num_experts: 4, router: {name: linear, selection: {name: top_p, p: 0.5}}",
    ):
        result = on_ranks.run(
            [model.replace("num_experts: 4", change), *settings[1:], "optimizer.epochs=0.03"]
        )
        assert 0 < result["bits_per_byte"] < 9
        assert ("drop_rate" in result) == ("top_p" in change)


def test_what_cannot_be_is_refused(settings: list[str], tmp_path: Path) -> None:
    for change, match in (
        ("data.sequence_length=65", "max_position_embeddings=64"),
        ("data.name=novels", "python_source"),
        ("model={preset: huge}", "huge"),
        ("model={}", r"model\.preset"),
    ):
        with pytest.raises(ConfigError, match=match):
            on_ranks.run([*settings, change])
    with pytest.raises(ConfigError, match="task='speech'"):
        load_config(on_ranks.CONFIG, ["task=speech"])
    with pytest.raises(ConfigError, match="no run"):
        generate(tmp_path / "nothing", "a")
