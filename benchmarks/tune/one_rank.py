"""One rank: what the tuner chooses, against every plan it could have chosen.

    python -m benchmarks.tune.one_rank

For each workload a layer trains under the tuner until its search is over. Then its choice and all plans take
steps in turns, the same number of each.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flexpert import MoE, MoEConfig
from flexpert.bench.machine import machine_facts
from flexpert.tune import Tuner, attach, cost_of
from flexpert.tune.candidate import describe

RESULTS = Path(__file__).parent / "results"
LONGEST = 400  # steps of a search
# Tokens, experts, top-k, D, F, capacity factor, dtype.
WORKLOADS = (
    (512, 8, 2, 256, 512, None, "float32"),
    (256, 64, 2, 64, 128, 1.25, "float32"),
    (64, 4, 1, 512, 1024, None, "float32"),
    (256, 64, 2, 32, 64, 1.25, "float64"),
    (512, 8, 2, 256, 512, 1.25, "bfloat16"),
    (2048, 4, 1, 128, 512, 2.0, "float32"),
)


class Steps:
    """Training steps of one layer."""

    def __init__(self, workload: tuple[Any, ...]) -> None:
        tokens, experts, top_k, model_dim, hidden_dim, factor, name = workload
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        self.layer = MoE(
            MoEConfig(
                model_dim=model_dim,
                hidden_dim=hidden_dim,
                num_experts=experts,
                top_k=top_k,
                capacity_factor=factor,
            )
        ).to(dtype)
        self.x = torch.randn(tokens, model_dim, dtype=dtype)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=1e-6)

    def run(self, plan: Any = None) -> None:
        """Forward, backward, optimiser."""
        self.layer(self.x, plan=plan).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(workload: tuple[Any, ...], repeats: int) -> dict[str, Any]:
    """One workload: the tuner's choice and every plan's milliseconds of a step."""
    steps, tuner = Steps(workload), Tuner(cost_of())
    attach(steps.layer, tuner)
    for _ in range(LONGEST):
        with tuner.step():
            steps.run()
        buckets = tuner.report()["buckets"]
        if buckets and all(bucket["settled"] for bucket in buckets):
            break
    (layer,) = tuner.layers.values()
    (bucket,) = buckets  # the same tokens in every step
    (entry,) = tuner.dictionary.entries.values()
    chosen = entry.search.plan
    # The choice takes part twice, under its own name as well: how far both are apart is the noise.
    contenders = [("chosen", chosen), *((describe(plan), plan) for plan in layer.plans)]
    times: dict[str, list[float]] = {name: [] for name, _ in contenders}
    order = random.Random(0)
    for turn in range(repeats + 1):
        order.shuffle(contenders)
        for name, plan in contenders:
            began = time.perf_counter()
            steps.run(plan)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - began))
    again = statistics.median(times.pop("chosen"))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name])
    return {
        "workload": list(workload),
        "chosen": describe(chosen),
        "why": bucket["why"],
        "settled": bucket["settled"],
        "trials": bucket["trials"],
        "steps": tuner.steps,
        "best": best,
        "chosen_over_best": medians[describe(chosen)] / medians[best],
        "again_ms": again,
        "median_ms": medians,
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS / "one_rank")
    options = parser.parse_args()
    facts = machine_facts()
    rows = [measure(workload, options.repeats) for workload in WORKLOADS]
    command = shlex.join(["python", "-m", "benchmarks.tune.one_rank", *sys.argv[1:]])
    lines = [
        f"`{command}`",
        "",
        f"A step is forward, backward and optimiser of one layer, on {facts['threads']} threads; medians of "
        f"{options.repeats} steps, in turns. The choice takes at most "
        f"{max(row['chosen_over_best'] for row in rows):.3f} of the best plan's time. The chosen plan takes "
        f"part twice (again): how far both are apart is the noise.",
        "",
        "| tokens, experts, top-k, D, F, capacity factor | dtype | chosen | ms | again | best | ms "
        "| chosen / best | worst ms | trials, steps |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        *sizes, dtype = row["workload"]
        cells = [
            ", ".join("none" if size is None else f"{size:g}" for size in sizes),
            dtype,
            row["chosen"],
            f"{row['median_ms'][row['chosen']]:.2f}",
            f"{row['again_ms']:.2f}",
            row["best"],
            f"{row['median_ms'][row['best']]:.2f}",
            f"{row['chosen_over_best']:.3f}",
            f"{max(row['median_ms'].values()):.2f}",
            f"{row['trials']}, {row['steps']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    options.output.parent.mkdir(exist_ok=True, parents=True)
    data = {"command": command, "facts": facts, "rows": rows}
    options.output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
