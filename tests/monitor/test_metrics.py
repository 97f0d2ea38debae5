from __future__ import annotations

import json
from pathlib import Path

import torch

from flexpert import MoE, MoEConfig, routing_scope
from flexpert.monitor.metrics import MetricsWriter, describe_routing, read_metrics


def test_a_resumed_writer_forgets_what_came_after_its_step_and_what_was_cut_off(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.rewind(0)
    for step in (1, 2, 3):
        writer.write(step, {"step": step, "loss": 1.0 / step, "load": {"a": [0.5, 0.5]}})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    again = MetricsWriter(tmp_path)
    again.rewind(2)
    again.write(3, {"step": 3, "loss": 7.0})
    again.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 0.5, 7.0]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_routing_figures_are_those_of_the_layers() -> None:
    config = MoEConfig(model_dim=4, hidden_dim=4, num_experts=4, top_k=2, capacity_factor=0.5)
    model = torch.nn.Sequential(MoE(config), MoE(config))
    with routing_scope(model) as scope:
        model(torch.randn(40, 4))
    figures = describe_routing(scope.stats)
    infos = list(scope.infos.values())
    kept = sum(int(info.routing.counts_E.sum()) for info in infos)
    assert figures["drop_rate"] == 1 - kept / (2 * 40 * 2)
    assert list(figures["load"]) == ["0", "1"]
    counts = infos[1].routing.counts_E
    torch.testing.assert_close(torch.tensor(figures["load"]["1"]), counts / counts.sum(), atol=1e-5, rtol=0)
    assert describe_routing({}) == {}
