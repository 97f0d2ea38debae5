from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flexpert.core.errors import CheckpointError, ConfigError
from flexpert.monitor.metrics import read_metrics
from flexpert.train.config import TrainConfig, load_config
from flexpert.train.job import evaluate, train

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
SMALL = [
    "model={preset: tiny, embed_dim: 16, depths: [1, 2], num_heads: [2, 2], pretrained_window_sizes: [0, 0],"
    " num_experts: 4, moe_dropout: 0.1, drop_path_rate: 0.1}",
    "optimizer.batch_size=16",
    "optimizer.epochs=4",  # 60 images: 3 steps each
    "checkpoint_every=3",
    "log_every=1",
    "threads=1",
]
# A child process that trains on the random images of a test as if they were the published ones.
CHILD = """
import gzip, hashlib, sys
from pathlib import Path
from flexpert.train import data
for file in Path(sys.argv[1]).glob("*.gz"):
    content = gzip.decompress(file.read_bytes())
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3]))
    data.FILES[file.stem] = data.IdxFile(shape, hashlib.sha256(content).hexdigest())
from flexpert.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def settings(tmp_path: Path, tiny_fashion_mnist: Path) -> list[str]:
    return [*SMALL, f"data.folder={tiny_fashion_mnist}", f"output={tmp_path / 'runs'}"]


def config(settings: list[str], *more: str) -> TrainConfig:
    return load_config(CONFIG, [*settings, *more])


def weights(run: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model.safetensors")


def assert_same_weights(one: Path | str, two: Path | str) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)


def test_a_run_leaves_everything_a_user_expects(settings: list[str]) -> None:
    result = train(config(settings))
    run = Path(result["run"])
    assert (result["steps"], result["images"]) == (12, 20)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["model"]["num_experts"] == 4
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"loss", "accuracy", "lr", "tokens_per_second", "drop_rate", "load", "seconds"} <= lines[0].keys()
    assert list((run / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (run / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [Path(plot).name for plot in result["plots"]] == ["learning_curve.png", "load.png"]
    assert all(Path(plot).stat().st_size > 1000 for plot in result["plots"])
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    assert json.loads((run / "result.json").read_text())["accuracy"] == result["accuracy"]


def test_the_same_settings_give_the_same_weights_and_a_new_folder(settings: list[str]) -> None:
    one, two = train(config(settings)), train(config(settings))
    assert Path(two["run"]).name == "fashion-mnist-2"
    assert_same_weights(one["run"], two["run"])
    other = train(config(settings, "seed=1"))
    assert any(not a.equal(weights(one["run"])[name]) for name, a in weights(other["run"]).items())


def run_until(settings: list[str], folder: Path, steps: int, *flags: str) -> None:
    """Train in a process of its own and kill it, without warning, once it has done so many steps."""
    data = next(item.partition("=")[2] for item in settings if item.startswith("data.folder="))
    command = [sys.executable, "-c", CHILD, data, "train", str(CONFIG), *settings, "name=killed", *flags]
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (folder / "config.yaml").exists() or len(read_metrics(folder)) < steps:
        assert child.poll() is None, child.stderr and child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_a_killed_run_resumes_to_the_same_bits(settings: list[str]) -> None:
    whole = train(config(settings, "name=whole"))
    killed = Path(whole["run"]).with_name("killed")
    run_until(settings, killed, 5)
    run_until(settings, killed, 8, "--resume")
    resumed = train(config(settings, "name=killed"), resume=True)
    assert_same_weights(whole["run"], resumed["run"])
    assert resumed["accuracy"] == whole["accuracy"]
    lines, expected = read_metrics(killed), read_metrics(Path(whole["run"]))
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


def test_a_run_killed_before_its_first_checkpoint_starts_again(settings: list[str], tmp_path: Path) -> None:
    whole = train(config(settings, "name=whole"))
    (tmp_path / "runs" / "killed").mkdir()
    resumed = train(config(settings, "name=killed"), resume=True)
    assert_same_weights(whole["run"], resumed["run"])


def test_a_finished_run_may_be_resumed(settings: list[str]) -> None:
    first = train(config(settings))
    before = weights(first["run"])
    again = train(config(settings), resume=True)
    assert again["run"] == first["run"]
    assert all(weights(first["run"])[name].equal(value) for name, value in before.items())


def test_what_cannot_be_resumed_says_why(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"there is no run .*without --resume"):
        train(config(settings), resume=True)
    run = Path(train(config(settings))["run"])
    with pytest.raises(ConfigError, match=r"other settings \(optimizer\)"):
        train(config(settings, "optimizer.lr=0.5"), resume=True)
    newest = max((run / "checkpoints").glob("step-*"))
    victim = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=victim.name):
        train(config(settings), resume=True)


def test_a_checkpoint_of_another_model_is_refused(settings: list[str]) -> None:
    run = Path(train(config(settings))["run"])
    other = Path(train(config(settings, "model.embed_dim=32", "name=other"))["run"])
    for path in (other / "checkpoints").iterdir():
        path.rename(path.with_name(f"step-9{path.name[-7:]}"))
    for path in (other / "checkpoints").iterdir():
        path.rename(run / "checkpoints" / path.name)
    with pytest.raises(CheckpointError):
        train(config(settings), resume=True)


def test_evaluate_repeats_the_accuracy_and_trades_it(settings: list[str]) -> None:
    result = train(config(settings))
    again = evaluate(Path(result["run"]), {})
    assert (again["accuracy"], again["images"]) == (result["accuracy"], 20)
    tight = evaluate(Path(result["run"]), {"capacity_factor": 0.25})
    loose = evaluate(Path(result["run"]), {"capacity_factor": None, "top_k": 2})
    assert tight["drop_rate"] > 0.2
    assert loose["drop_rate"] == 0
    assert evaluate(Path(result["run"]), {})["drop_rate"] == again["drop_rate"]  # nothing sticks


def test_evaluate_says_what_it_cannot_do(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        evaluate(tmp_path / "none", {})
    with pytest.raises(ConfigError, match="no saved model"):
        evaluate(tmp_path, {})
    run = Path(train(config(settings, "model.num_experts=0"))["run"])
    assert "drop_rate" not in evaluate(run, {})
    with pytest.raises(ConfigError, match="dense model: top_k would change nothing"):
        evaluate(run, {"top_k": 2})
    with pytest.raises(ConfigError, match="unknown option 'topk'; did you mean 'top_k'"):
        evaluate(run, {"topk": 2})
    weights_file = run / "model" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        evaluate(run, {})


def test_bfloat16_trains(settings: list[str]) -> None:
    result = train(config(settings, "optimizer.dtype=bfloat16"))
    losses = [line["loss"] for line in read_metrics(Path(result["run"]))]
    assert all(0 < loss < 5 for loss in losses)
