"""The cost model against the clock, the byte counters and the memory of emulated clusters.

    python -m benchmarks.tune.predict

Each cluster is calibrated first, on probes alone; then plans are measured, forward and backward, on layers,
tokens and skews that the calibration has not seen.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flexpert.bench.machine import machine_facts
from flexpert.emulate import Cluster
from flexpert.parallel import ExecutionPlan, ExpertMesh, expert_mesh, parallelize
from flexpert.tune import LayerShape, Machine, Workload, candidates, predict
from flexpert.tune.calibrate import calibrate

from .accuracy import text_of
from .loads import (
    CLUSTERS,
    LAYERS,
    LOADS,
    cluster_name,
    layer_name,
    layer_of,
    load_name,
    places_of,
    tokens_of,
)
from .memory import ALONE, CASES, peak_of_step

RESULTS = Path(__file__).parent / "results"
PATIENCE = 600.0


def plans_for(shape: LayerShape) -> list[ExecutionPlan]:
    """All that the tuner may choose; of padded ones two degrees."""
    return [plan for plan in candidates(shape) if plan.capacity == "ragged" or plan.degree in (1, 4)]


def on_rank(local: int, repeats: int) -> dict[str, Any]:
    """Calibrate, then measure and predict every plan of every load."""
    began = time.perf_counter()
    machine = calibrate(ranks_per_node=local)
    seconds = time.perf_counter() - began
    rows = []
    for settings in LAYERS:
        mesh = expert_mesh(settings["experts"], ranks_per_node=local, **places_of(settings))
        layer = layer_of(settings)
        parallelize(layer, mesh)
        for tokens, skew in LOADS[: settings.get("loads")]:
            rows += measure(layer, mesh, machine, tokens, skew, repeats)
    return {"machine": machine.to_json(), "seconds": seconds, "rows": [_plain(row) for row in rows]}


def measure(
    layer: Any, mesh: ExpertMesh, machine: Machine, tokens: int, skew: float, repeats: int
) -> list[dict[str, Any]]:
    """One load under each plan: seconds, bytes, and what was predicted."""
    x = tokens_of(dist.get_rank(), tokens, layer.experts.model_dim, skew).requires_grad_()

    def call(plan: ExecutionPlan) -> None:
        layer(x, plan=plan).sum().backward()
        layer.zero_grad(set_to_none=True)

    shape = LayerShape.of(mesh, layer.experts)
    plans = plans_for(shape)
    times = in_turns([lambda plan=plan: call(plan) for plan in plans], repeats)
    routing = layer(x, return_info=True)[1].routing
    rows_PE = torch.empty(mesh.whole.size, mesh.num_experts, dtype=torch.int64)
    mesh.whole.all_gather(rows_PE.view(-1), routing.counts_E.contiguous())
    workload = Workload(rows_PE=rows_PE, tokens=tokens)
    rows = []
    for i, plan in enumerate(plans):
        mesh.traffic.reset()
        call(plan)
        sent = torch.tensor([mesh.traffic.inside, mesh.traffic.between])
        table = torch.empty(dist.get_world_size(), 2, dtype=torch.int64)
        dist.all_gather_single(table.view(-1), sent)
        most = table[table.sum(1).argmax()]
        cost = predict(shape, plan, workload, machine)
        rows.append(
            {
                "layer": layer_name(shape),
                "load": load_name(tokens, skew),
                "plan": plan.to_dict(),
                "measured_ms": statistics.median(times[i]),
                "times_ms": times[i],
                "predicted_ms": 1e3 * cost.seconds,
                "parts_ms": {name: 1e3 * value for name, value in cost.parts.items()},
                "bytes_measured": most.tolist(),
                "bytes_predicted": [cost.bytes_inside, cost.bytes_between],
            }
        )
    return rows


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(row))


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of each call, one of each in turn; the slowest rank counts, the first round does not."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for place, call in enumerate(calls):
            dist.barrier()
            began = time.perf_counter()
            call()
            took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if repeat:
                times[place].append(1e3 * float(took))
    return times


def main() -> None:
    """Measure and write the results; what is not measured stays as the file has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="*", help="of the clusters, from 0")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "predict")
    options = parser.parse_args()
    facts = machine_facts()  # builds the native library before ranks compete for the processors
    run = {"command": shlex.join(["python", "-m", "benchmarks.tune.predict", *sys.argv[1:]]), "facts": facts}
    data: dict[str, Any] = {"clusters": [], "rows": [], "memory": []}
    file = options.output.with_suffix(".json")
    if file.exists():
        data = json.loads(file.read_text(encoding="utf-8"))
    for spec in [CLUSTERS[i] for i in options.only] if options.only is not None else CLUSTERS:
        label = cluster_name(spec)
        with Cluster(**spec) as cluster:
            timeouts = {"timeout": PATIENCE, "collective_timeout": PATIENCE}
            found = cluster.run(on_rank, spec["ranks"], options.repeats, **timeouts)[0]
        machine = json.loads(found["machine"])
        put(data["clusters"], [{"cluster": label, **run, "seconds": found["seconds"], "machine": machine}])
        put(data["rows"], [{"cluster": label, **row} for row in found["rows"]])
        print(label, f"calibrated in {found['seconds']:.1f} s", file=sys.stderr, flush=True)
        write(options.output, data)
    if not options.no_memory:
        data["memory"] = [{**row, "command": run["command"]} for row in peaks()]
        write(options.output, data)
    print(text_of(data), flush=True)


def put(table: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """The rows of a cluster in the place of those that are there; clusters stay in their order."""
    label = rows[0]["cluster"]
    order = [cluster_name(spec) for spec in CLUSTERS]
    kept = [row for row in table if row["cluster"] != label]
    table[:] = sorted([*kept, *rows], key=lambda row: order.index(row["cluster"]))


def peaks() -> list[dict[str, Any]]:
    """Memory of a step under a few plans, on ranks of their own."""
    timeouts, rows = {"timeout": PATIENCE, "collective_timeout": PATIENCE}, []
    for nodes, local, cases in ((1, 1, ALONE), (2, 2, range(len(CASES)))):
        with Cluster(nodes=nodes, ranks=local) as cluster:
            rows += [cluster.run(peak_of_step, case, **timeouts)[0] for case in cases]
    return rows


def write(output: Path, data: dict[str, Any]) -> None:
    """JSON with all, Markdown with the tables."""
    output.parent.mkdir(exist_ok=True, parents=True)
    output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text_of(data), encoding="utf-8")


if __name__ == "__main__":
    main()
