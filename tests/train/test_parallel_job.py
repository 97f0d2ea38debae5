"""The whole job on several ranks: the losses of one process, one model, one voice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexpert.monitor.metrics import read_metrics
from flexpert.testing import assert_close, run_ranks
from flexpert.train.job import evaluate
from tests.train import vision_ranks as on_ranks

SMALL = [
    "model={preset: tiny, embed_dim: 16, depths: [1, 2], num_heads: [2, 2], pretrained_window_sizes: [0, 0],"
    " num_experts: 4, capacity_factor: null}",
    "optimizer.batch_size=15",  # 8 and 7 images
    "optimizer.epochs=1.5",  # 6 steps
    "checkpoint_every=3",
    "log_every=1",
    "threads=1",
    "device=cpu",
    "parallel.plan={}",  # the same in every run: nothing is measured, nothing differs in the order of sums
]
# Relative, in fp32 without drops: what is left is the order of sums, which AdamW carries on.
TOLERANCE = 1e-5


@pytest.fixture
def settings(tmp_path: Path, tiny_fashion_mnist: Path) -> list[str]:
    return [*SMALL, f"data.folder={tiny_fashion_mnist}", f"output={tmp_path / 'runs'}"]


def losses(run: Path | str) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(run))]


def together(size: int, folder: Path, settings: list[str], resume: bool = False) -> dict[str, Any]:
    """The result of the job on ranks, of which all but rank 0 have none."""
    first, *others = run_ranks(on_ranks.run, size, folder, settings, resume, timeout=300)
    assert others == [None] * (size - 1)
    assert isinstance(first, dict)
    return first


def test_ranks_train_as_one_process_does(tiny_fashion_mnist: Path, settings: list[str]) -> None:
    alone = on_ranks.run(tiny_fashion_mnist, settings)
    model = Path(alone["run"]) / "model"
    weights = load_file(model / "model.safetensors")
    assert len(losses(alone["run"])) == 6
    for more, plan in {
        ("parallel.plan.r=0",): "r=0 degree=1",
        ("parallel.plan={r: 1, degree: 2}",): "r=1 degree=2",
        ("parallel.slices=2", "parallel.plan.r=2", "parallel.verify=false"): "r=2 degree=1",
        ("parallel.dense=fsdp", "checkpoint_async=false"): "r=1 degree=1",
    }.items():
        result = together(2, tiny_fashion_mnist, [*settings, *more])
        run = Path(result["run"])
        assert losses(run) == pytest.approx(losses(alone["run"]), rel=TOLERANCE), more
        line = read_metrics(run)[-1]
        assert line["plan"] == f"{plan} algorithm=linear capacity=ragged codec=none kernel=auto"
        assert line["bytes_inside"] > 0 == line["bytes_between"]
        saved = load_file(run / "model" / "model.safetensors")
        assert saved.keys() == weights.keys()
        for name, value in weights.items():
            assert_close(saved[name], value, 1e-3, scale=1e-3, name=name)  # 6 steps of up to 2e-3 each
        for file in ("config.json", "README.md"):
            assert (run / "model" / file).read_text() == (model / file).read_text()
        assert evaluate(run, {})["accuracy"] == result["accuracy"]


def test_a_run_goes_on_on_any_number_of_ranks(tiny_fashion_mnist: Path, settings: list[str]) -> None:
    settings = [*settings, "name=two"]
    same = "parallel.plan.degree=2"
    run = Path(together(2, tiny_fashion_mnist, [*settings, same])["run"])
    weights = load_file(run / "model" / "model.safetensors")
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))
    for size, more in ((1, []), (2, [same]), (2, ["parallel.dense=fsdp"]), (3, ["parallel.replicas=3"])):
        output = run.parent.with_name(f"on-{size}-{len(more and more[0])}")
        shutil.copytree(run.parent, output)
        text = (run / "config.yaml").read_text().replace(str(run.parent), str(output))
        (output / "two" / "config.yaml").write_text(text)
        again = [*settings, *more, f"output={output}"]
        if size == 1:
            on_ranks.run(tiny_fashion_mnist, again, resume=True)
        else:
            together(size, tiny_fashion_mnist, again, resume=True)
        assert losses(output / "two") == pytest.approx(losses(run), rel=TOLERANCE)
        if more == [same]:  # bit for bit
            resumed = load_file(output / "two" / "model" / "model.safetensors")
            assert all(resumed[name].equal(value) for name, value in weights.items())


def test_dropout_in_experts_and_drops_run_on_ranks(tiny_fashion_mnist: Path, settings: list[str]) -> None:
    model = settings[0].replace("capacity_factor: null", "moe_dropout: 0.1, drop_path_rate: 0.1")
    bias = "model.router={name: linear, selection_bias: true}"
    for more in (["optimizer.batch_size=1"], ["optimizer.accumulate=2", "parallel.plan.capacity=padded"]):
        result = together(2, tiny_fashion_mnist, [model, *settings[1:], bias, "optimizer.epochs=0.1", *more])
        assert all(0 < loss < 5 for loss in losses(result["run"]))
        saved = load_file(Path(result["run"]) / "model" / "model.safetensors")
        biases = [value for name, value in saved.items() if name.endswith("selection_bias")]
        assert biases
        assert all(bool(value.abs().max() >= 0.000999) for value in biases)  # each step moves it by 0.001
        assert all(bool(torch.isfinite(value).all()) for value in saved.values())
