"""The cost model against the clock, the byte counters and the memory of emulated clusters.

    python -m benchmarks.tune.predict

Each cluster is calibrated first, on probes alone; then plans are measured, forward and backward, on layers,
tokens and skews that the calibration has not seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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


def kendall(measured: Sequence[float], predicted: Sequence[float], least: Sequence[float] = ()) -> float:
    """Tau-a: pairs in the same order less those in the other, over all pairs.

    Args:
        measured, predicted: of each plan.
        least: standard errors of `measured`; pairs within two of their difference are left out. None: all.
    """
    signs = []
    for i, j in itertools.combinations(range(len(measured)), 2):
        if least and abs(measured[i] - measured[j]) <= 2 * math.hypot(least[i], least[j]):
            continue
        signs.append((measured[i] - measured[j]) * (predicted[i] - predicted[j]))
    return sum((s > 0) - (s < 0) for s in signs) / max(len(signs), 1)


def standard_error(times: Sequence[float]) -> float:
    """Of their median, from their median deviation: outliers do not count."""
    middle = statistics.median(times)
    deviation = 1.4826 * statistics.median(abs(t - middle) for t in times)
    return 1.2533 * deviation / math.sqrt(len(times))


def repeatability(times: Sequence[Sequence[float]]) -> float:
    """Tau between medians of one half of the repeats and of the other, the mean over all halves."""
    number = len(times[0])
    found = []
    for half in itertools.combinations(range(number), number // 2):
        rest = [i for i in range(number) if i not in half]
        pair = [[statistics.median(t[i] for i in places) for t in times] for places in (half, rest)]
        found.append(kendall(*pair))
    return statistics.mean(found)


def summary(cluster: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each load of each layer."""
    lines = []
    for key in dict.fromkeys((row["layer"], row["load"]) for row in rows):
        part = [row for row in rows if (row["layer"], row["load"]) == key]
        errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in part]
        measured, predicted = ([row[name] for row in part] for name in ("measured_ms", "predicted_ms"))
        times = [row["times_ms"] for row in part]
        chosen = measured[predicted.index(min(predicted))]
        exact = all(row["bytes_measured"] == row["bytes_predicted"] for row in part)
        lines.append(
            [
                cluster,
                *key,
                str(len(part)),
                f"{min(measured):.0f} to {max(measured):.0f}",
                f"{statistics.median(errors):.0%}",
                f"{max(errors):.0%}",
                f"{kendall(measured, predicted):.2f}",
                f"{kendall(measured, predicted, [standard_error(t) for t in times]):.2f}",
                f"{repeatability(times):.2f}",
                f"{chosen / min(measured):.2f}",
                "exact" if exact else "WRONG",
            ]
        )
    return lines


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="*", help="of the clusters, from 0")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "predict")
    options = parser.parse_args()
    facts = machine_facts()  # builds the native library before ranks compete for the processors
    clusters, lines, rows = [], [], []
    for spec in [CLUSTERS[i] for i in options.only] if options.only is not None else CLUSTERS:
        label = cluster_name(spec)
        with Cluster(**spec) as cluster:
            timeouts = {"timeout": PATIENCE, "collective_timeout": PATIENCE}
            found = cluster.run(on_rank, spec["ranks"], options.repeats, **timeouts)[0]
        found["rows"] = [{"cluster": label, **row} for row in found["rows"]]
        clusters.append(
            {"cluster": label, "seconds": found["seconds"], "machine": json.loads(found["machine"])}
        )
        lines += summary(label, found["rows"])
        rows += found["rows"]
        print(label, f"calibrated in {found['seconds']:.1f} s", file=sys.stderr, flush=True)
    write(options.output, facts, clusters, lines, rows, [])  # what there is, should memory fail
    if not options.no_memory:
        write(options.output, facts, clusters, lines, rows, peaks())


def peaks() -> list[dict[str, Any]]:
    """Memory of a step under a few plans, on ranks of their own."""
    timeouts, rows = {"timeout": PATIENCE, "collective_timeout": PATIENCE}, []
    for nodes, local, cases in ((1, 1, ALONE), (2, 2, range(len(CASES)))):
        with Cluster(nodes=nodes, ranks=local) as cluster:
            rows += [cluster.run(peak_of_step, case, **timeouts)[0] for case in cases]
    return rows


def write(
    output: Path,
    facts: dict[str, Any],
    clusters: list[dict[str, Any]],
    lines: list[list[str]],
    rows: list[dict[str, Any]],
    memory: list[dict[str, Any]],
) -> None:
    """JSON with all, Markdown with the tables; printed as well."""
    errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in rows]
    taus, apart, repeated = ([float(line[i]) for line in lines] for i in (7, 8, 9))
    off = [abs(row["predicted_mib"] / row["measured_mib"] - 1) for row in memory]
    exact = all(row["bytes_measured"] == row["bytes_predicted"] for row in rows)
    middle = statistics.median(errors or [0])
    words = (
        f"{len(rows)} plans in {len(lines)} loads. Median error of a step's time: {middle:.0%}. Kendall's "
        f"tau of the plans of a load, mean (least to most): {_mean(taus)}; of pairs that measurements tell "
        f"apart (by two standard errors): {_mean(apart)}; between one half of them and the other half, "
        f"what can be asked for: {_mean(repeated)}. Bytes {'exact' if exact else 'WRONG'}, memory off "
        f"by {max(off, default=0):.1%} at most. Milliseconds are medians, forward and backward, the slowest "
        f"rank counts. Chosen / best: the measured time of the plan that is predicted to be best, over that "
        f"of the best."
    )
    header = ["cluster", "layer", "load", "plans", "measured ms", "median error", "largest", "tau",
              "tau, told apart", "tau, repeated", "chosen / best", "bytes"]  # fmt: skip
    table = _table(header, lines)
    header = ["plan", "tokens", "measured MiB", "predicted MiB", "error"]
    sizes = [
        [
            row["plan"],
            str(row["tokens"]),
            f"{row['measured_mib']:.1f}",
            f"{row['predicted_mib']:.1f}",
            f"{row['predicted_mib'] / row['measured_mib'] - 1:+.1%}",
        ]
        for row in memory
    ]
    command = shlex.join(["python", "-m", "benchmarks.tune.predict", *sys.argv[1:]])
    text = f"`{command}`\n\n{words}\n\n{table}\n\nMemory of a rank at the peak of a step:\n\n"
    text += _table(header, sizes) + "\n"
    output.parent.mkdir(exist_ok=True, parents=True)
    data = {"command": command, "facts": facts, "clusters": clusters, "rows": rows, "memory": memory}
    output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(rows + ["| " + " | ".join(line) + " |" for line in lines])


if __name__ == "__main__":
    main()
