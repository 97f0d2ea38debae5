"""Clusters, models, plans and traffic from texts and files; bad ones are refused by field."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flexpert.core.errors import ConfigError
from flexpert.simulate import Cluster, ExpertPart, JobPlan, Model, Recorded, Synthetic, parse_traffic
from flexpert.simulate.job import layer_shape
from flexpert.simulate.models import parse_model, swinv2_moe
from flexpert.simulate.traffic import workload

A100 = "a100-ndv4:nodes=2"


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.9),
        ("qwen3-30b-a3b", 30.5, 3.35),
        ("deepseek-moe-16b", 16.4, 2.83),
        # Tutel, table 11; millions there
        ("swinv2-moe-small:num_experts=8", 0.1733, 0.0658),
        ("swinv2-moe-base:num_experts=32", 0.9553, 0.1093),
        ("swinv2-moe-base:num_experts=32,top_k=2", 0.9553, 0.1366),
    ],
)
def test_models_have_their_published_sizes(name, billions, active):
    model = parse_model(name)
    assert model.params / 1e9 == pytest.approx(billions, rel=0.005)
    assert model.active_params / 1e9 == pytest.approx(active, rel=0.005)


@pytest.mark.parametrize(
    ("name", "gflops"),
    [("swinv2-moe-small:num_experts=0", 6.76), ("swinv2-moe-base:num_experts=32", 11.78)],
)
def test_models_have_their_published_operations(name, gflops):
    """Tutel, table 11, which counts a multiply-add once."""
    assert parse_model(name).flops_per_sample / 2e9 == pytest.approx(gflops, rel=0.005)


def test_parameters_are_those_of_the_network():
    from flexpert.models import SwinV2MoEForImageClassification, preset

    with torch.device("meta"):
        network = SwinV2MoEForImageClassification(preset("tiny"))
    model = parse_model("swinv2-moe-tiny")
    experts = sum(p.numel() for n, p in network.named_parameters() if ".experts." in n)
    assert model.expert_params == experts
    assert model.params == pytest.approx(sum(p.numel() for p in network.parameters()), rel=0.02)


def test_a_cluster_is_the_same_after_a_file(tmp_path):
    cluster = Cluster.parse("a100-ndv4:nodes=3,devices=4,slow_node=1@0.5,slow_link=2@0.25,slow_rank=0@0.9")
    path = tmp_path / "lab.json"
    path.write_text(json.dumps(cluster.to_dict()), encoding="utf-8")
    again = Cluster.parse(str(path))
    assert again == cluster
    assert again.ranks == 12
    assert again.compute_W.tolist() == [0.9, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1]
    assert again.link_N.tolist() == [1, 1, 0.25]
    assert Cluster.parse(f"{path}:nodes=4").nodes == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100", "cluster: unknown preset 'a100': did you mean 'a100-ndv4'?"),
        ("a100-ndv4:nodes=0", "cluster: nodes=0: expected an integer >= 1"),
        ("a100-ndv4:nodes=two", "cluster: nodes='two'"),
        ("a100-ndv4:node=2", "cluster: unknown option 'node'; did you mean 'nodes'?"),
        ("a100-ndv4:nodes", "'nodes' is no setting"),
        ("a100-ndv4:nodes=2,nodes=3", "nodes is given twice"),
        ("a100-ndv4:nodes=100000", "800000 ranks; at most 65536"),
        ("a100-ndv4:nodes=2,slow_node=2@0.5", r"unlike\[0\]: node=2, expected an integer in 0..1"),
        ("a100-ndv4:nodes=2,slow_node=1", "slow_node=1, expected NODE@SPEED"),
        ("a100-ndv4:nodes=2,slow_link=1@0", r"unlike\[0\]: link=0.0"),
        ("missing.yaml", "cluster 'missing.yaml' cannot be read"),
    ],
)
def test_bad_clusters_name_the_field(text, message):
    with pytest.raises(ConfigError, match=message):
        Cluster.parse(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "expected a mapping"),
        ("nodes: 2\ndevices: 2", "cluster: machine is missing"),
        ("nodes: 2\ndevices: 2\nmachine: 7", "cluster: machine=7"),
        ("nodes: 2\ndevices: 2\nmachine: b100", "cluster: machine='b100' is no file and no preset"),
        ("nodes: 2\ndevices: 2\nmachine: .", "cluster: machine='.' is not the file of a calibration"),
        (
            "nodes: 2\ndevices: 2\nmachine: a100-ndv4\nunlike: [{rank: 1, memory: 0}]",
            r"unlike\[0\]: memory=0",
        ),
        ("nodes: 2\ndevices: 2\nmachine: {format: 99}", "machine: format=99"),
        ("nodes: 2\ndevices: 2\nmachine: a100-ndv4\nunlike: 3", "unlike=3, expected a list"),
        ("nodes: 2\ndevices: 2\nmachine: a100-ndv4\nunlike: [3]", r"unlike\[0\]=3, expected a mapping"),
        (
            "nodes: 2\ndevices: 2\nmachine: a100-ndv4\nunlike: [{rank: 1, link: 0.5}]",
            r"unlike\[0\]: link=0.5 of a rank",
        ),
        ("nodes: [", "is no YAML"),
    ],
)
def test_bad_cluster_files_name_the_field(tmp_path, content, message):
    path = tmp_path / "lab.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Cluster.parse(str(path))


def test_a_model_of_blocks_from_a_file(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(
        "kind: blocks\nsample: image\nblocks:\n- {tokens: 4, width: 8, params: 64, flops: 128}\n"
        "- {tokens: 4, width: 8, experts: {model_dim: 8, hidden_dim: 16, num_experts: 2, gated: true}}\n",
        encoding="utf-8",
    )
    model = parse_model(str(path))
    assert model.params == 64 + 2 * 3 * 8 * 16
    assert model.flops_per_sample == 4 * 128 + 4 * 2 * 3 * 8 * 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixtral", "model: unknown name 'mixtral'"),
        ("layer:modeldim=3", "unknown option 'modeldim'; did you mean 'model_dim'?"),
        ("layer:model_dim=-1", "experts: model_dim=-1"),
        ("layer:top_k=9", "experts: top_k=9"),
        ("layer:dtype=int8", "model: dtype='int8', expected one of float32, bfloat16, float16"),
        ("mixtral-8x7b:layers=0", "model: layers=0"),
        ("mixtral-8x7b:model_dim=wide", "model: model_dim='wide'"),
        ("mixtral-8x7b:kv_heads=-1", "model: kv_heads=-1"),
        ("mixtral-8x7b:head_dim=1.5", "model: head_dim=1.5"),
        ("mixtral-8x7b:hidden_dim=-1", "model: hidden_dim=-1"),
        ("mixtral-8x7b:num_experts=-8", "model: num_experts=-8"),
        ("mixtral-8x7b:tied=3", "model: tied=3"),
        ("swinv2-moe-base:experts=3", "unknown option 'experts'"),
    ],
)
def test_bad_models_name_the_field(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_model(text)


def test_a_machine_that_is_damaged_names_file_and_field(tmp_path):
    data = {**Cluster.parse(A100).machine.to_dict(), "rates": {"float32": {"rows": [1]}}}
    (tmp_path / "machine.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "lab.yaml").write_text(
        f"nodes: 2\ndevices: 2\nmachine: {tmp_path}/machine.json\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"machine\.json.*machine\.rates\[float32\]: forward is missing"):
        Cluster.parse(str(tmp_path / "lab.yaml"))


def test_images_that_are_no_square_are_refused():
    with pytest.raises(ConfigError, match=r"image_size=\[32, 64\]: .* square images"):
        swinv2_moe("tiny", image_size=[32, 64])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "m", "blocks": []}, "blocks is empty"),
        ({"name": "m", "blocks": 3}, "blocks=3, expected a list"),
        ({"name": "m"}, "model: blocks is missing"),
        ({"name": "m", "blocks": [{"tokens": 1}]}, r"blocks\[0\]: width is missing"),
        ({"name": "m", "blocks": [{"tokens": 0, "width": 1}]}, "block '0': tokens=0"),
        ({"name": "m", "blocks": [{"tokens": 1, "width": 1, "experts": 2}]}, "experts=2, expected a mapping"),
    ],
)
def test_bad_blocks_name_the_field(data, message):
    with pytest.raises(ConfigError, match=message):
        Model.from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r=-1", "plan: r=-1"),
        ("degrees=2", "unknown option 'degrees'"),
        ("dense_shards=0", "plan: dense_shards=0"),
        ("checkpointing=2", "plan: checkpointing=2"),
        ("micro_batch=0", "plan: micro_batch=0"),
    ],
)
def test_bad_plans_name_the_field(text, message):
    with pytest.raises(ConfigError, match=message):
        JobPlan.parse(text)


def test_a_plan_is_the_same_after_plain_data():
    plan = JobPlan.parse("r=2,degree=4,algorithm=2dh,replicas=2,dense_shards=8,checkpointing=true")
    assert JobPlan.from_dict(plan.to_dict()) == plan
    assert JobPlan.parse(plan.describe()) == plan


PART = ExpertPart(model_dim=16, hidden_dim=32, num_experts=8, top_k=2, capacity_factor=1.0)


def rows(traffic, part=PART, tokens=512, **place):
    model = parse_model("layer:model_dim=16,hidden_dim=32,num_experts=8")
    shape = layer_shape(model, part, Cluster.parse(A100), JobPlan(slices=2))
    return workload(traffic, part, shape, tokens, **place).rows_PE


def test_uniform_traffic_is_exact_and_zipf_follows_its_law():
    assert rows(Synthetic()).unique().tolist() == [128]
    dropless = ExpertPart(model_dim=16, hidden_dim=32, num_experts=8, top_k=2)
    rows_PE = rows(Synthetic(skew=1.0), dropless, tokens=40_000)
    assert rows_PE.sum(1).unique().tolist() == [80_000]
    shares = (rows_PE.sum(0) / rows_PE.sum()).sort(descending=True).values.numpy()
    law = 1 / np.arange(1, 9)
    assert np.abs(shares - law / law.sum()).max() < 0.01


def test_capacity_drops_what_is_above_it():
    rows_PE = rows(Synthetic(skew=2.0))
    assert int(rows_PE.max()) == PART.capacity(512) == 128


def test_traffic_is_a_function_of_its_seed_layer_and_step():
    traffic = Synthetic(skew=1.0, drift=0.3, correlation=0.5, seed=3)
    first = rows(traffic, layer=2, step=4)
    assert torch.equal(first, rows(Synthetic(skew=1.0, drift=0.3, correlation=0.5, seed=3), layer=2, step=4))
    for other in (rows(traffic, layer=3, step=4), rows(traffic, layer=2, step=5), rows(Synthetic(skew=1.0))):
        assert not torch.equal(first, other)


def test_drift_and_correlation():
    def likeness(traffic, one, other):
        busy = [np.log(traffic.shares(*place, 512)) for place in (one, other)]
        return float(np.corrcoef(*busy)[0, 1])

    still, slow, fast = (Synthetic(skew=1.0, drift=drift) for drift in (0.0, 0.05, 1.0))
    assert likeness(still, (0, 0), (0, 9)) == pytest.approx(1)
    assert abs(likeness(fast, (0, 0), (0, 1))) < 0.2
    assert likeness(slow, (0, 0), (0, 1)) > likeness(slow, (0, 0), (0, 9)) > 0.2
    apart, alike = (Synthetic(skew=1.0, correlation=c) for c in (0.0, 1.0))
    assert likeness(alike, (0, 0), (5, 0)) == pytest.approx(1)
    assert abs(likeness(apart, (0, 0), (5, 0))) < 0.2


def test_a_run_replays_its_metrics(tmp_path):
    lines = [{"step": s, "load": {"a": [0.5, 0.5], "b": [0.25 * s, 1 - 0.25 * s]}} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    traffic = parse_traffic(f"trace:{tmp_path}")
    assert traffic.seed == 0
    assert parse_traffic(f"trace:{tmp_path},seed=3").seed == 3
    assert traffic.shares(1, 0, 2).tolist() == [0.25, 0.75]
    assert traffic.shares(1, 1, 2).tolist() == [0.5, 0.5]
    assert traffic.shares(3, 2, 2).tolist() == [0.25, 0.75]  # from the start again
    with pytest.raises(ConfigError, match="layer 'a' of the trace has 2 experts, the model 8"):
        traffic.shares(0, 0, 8)


@pytest.mark.parametrize("text", ["{", "3", '{"load": 3}', '{"load": {"a": 3}}'])
def test_a_damaged_run_is_no_trace(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"traffic: .*(metrics.jsonl is damaged|is no table)"):
        parse_traffic(f"trace:{tmp_path}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="has no metrics.jsonl with the load of experts"):
        parse_traffic(f"trace:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no trace"),
        ('{"layers": {}}', "a layer at least"),
        ('{"layers": {"a": [[1, -1]]}}', r"layers\['a'\] is no table"),
        ('{"layers": {"a": [[1, 2], [1]]}}', r"layers\['a'\] is no table"),
        ('{"layers": {"a": [[0, 0]]}}', r"layers\['a'\] has a step without rows"),
    ],
)
def test_bad_traces_are_refused(tmp_path, content, message):
    path = tmp_path / "trace.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Recorded.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zipfian", "traffic: unknown name 'zipfian'"),
        ("zipf:skew=-1", "traffic: skew=-1"),
        ("zipf:drift=2", "traffic: drift=2, expected a number in 0..1"),
        ("uniform:skew=1", "unknown option 'skew'"),
        ("trace:nowhere", "nowhere is no trace"),
        ("trace:nowhere,seed=-1", "seed='-1', expected an integer >= 0"),
    ],
)
def test_bad_traffic_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_traffic(text)
